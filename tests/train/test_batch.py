"""Rows out of Arrow, the cut under a token budget, the token shift, weights and padding."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from raystill.datasets.rows.schema import row_schema
from raystill.datasets.rows.signal import Signal
from raystill.train.batch.batch import collate, cut_micro_batches, dummy_micro_batch, loss_weight
from raystill.train.batch.partition import NO_ID
from raystill.train.batch.rows import Row, rows_from_table

TOP_K = 3


def make_row(position, prompt, response, signal=False):
    row = Row(position, position, np.array(prompt, np.int32), np.array(response, np.int32), "stop")
    if signal:
        tokens = len(response)
        row.sampled_logprobs = np.full(tokens, np.log(0.5), np.float32)
        row.topk_ids = np.array([[r, 40 + t, 50] for t, r in enumerate(response)], np.int32)
        row.topk_logprobs = np.log(np.tile(np.float32([0.5, 0.3, 0.1]), (tokens, 1)))
        row.tail_logprob = np.full(tokens, np.log(0.1), np.float32)
    return row


def make_table(num_rows, kind="topk"):
    generator = np.random.default_rng(0)
    columns = {name: [] for name in row_schema(Signal(kind, TOP_K)).names}
    for i in range(num_rows):
        tokens = int(generator.integers(0, 5))
        values = {
            "row": 100 + i,
            "position": i,
            "epoch": 0,
            "source": "test",
            "prompt_ids": generator.integers(0, 60, int(generator.integers(0, 6))).tolist(),
            "response_ids": generator.integers(0, 60, tokens).tolist(),
            "finish_reason": "stop" if i % 2 else "length",
            "sampled_logprobs": generator.standard_normal(tokens).tolist(),
            "topk_ids": generator.integers(0, 60, (tokens, TOP_K)).tolist(),
            "topk_logprobs": generator.standard_normal((tokens, TOP_K)).tolist(),
            "tail_logprob": generator.standard_normal(tokens).tolist(),
        }
        for name, column in columns.items():
            column.append(values[name])
    return pa.table(columns, schema=row_schema(Signal(kind, TOP_K)))


def assert_same_rows(rows, table):
    assert len(rows) == table.num_rows
    for row, expected in zip(rows, table.to_pylist(), strict=True):
        assert (row.row, row.position) == (expected["row"], expected["position"])
        assert row.finish_reason == expected["finish_reason"]
        for name in set(expected) - {"row", "position", "epoch", "source", "finish_reason"}:
            values = getattr(row, name)
            shape = (len(expected["response_ids"]), TOP_K) if "topk" in name else (-1,)
            wanted = np.array(expected[name], dtype=values.dtype).reshape(shape)
            np.testing.assert_array_equal(values, wanted, err_msg=name)


@pytest.mark.parametrize("kind", ["text", "sampled", "topk"])
def test_rows_from_a_table_hold_its_values(kind):
    assert_same_rows(rows_from_table(make_table(9, kind)), make_table(9, kind))


def test_rows_from_sliced_and_chunked_tables_hold_their_values():
    table = make_table(20)
    for part in (table.slice(3, 11), pa.concat_tables([table.slice(7, 5), table.slice(1, 4)])):
        assert_same_rows(rows_from_table(part), part)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part)
        received = pa.ipc.open_stream(sink.getvalue()).read_all()
        assert_same_rows(rows_from_table(received), part)
    assert rows_from_table(table.slice(0, 0)) == []


def test_rows_from_slices_of_the_inner_lists_hold_their_values():
    table = make_table(12)
    column = table.column("topk_ids").combine_chunks()
    shifted = pa.ListArray.from_arrays(
        pa.array(np.asarray(column.offsets)[5:] - np.asarray(column.offsets)[5]),
        column.values.slice(np.asarray(column.offsets)[5].item()),
    )
    part = table.slice(5).set_column(
        table.schema.get_field_index("topk_ids"), table.schema.field("topk_ids"), shifted
    )
    assert_same_rows(rows_from_table(part), part)


def test_rows_are_views_of_the_tables_buffers():
    column = make_table(9).column("topk_logprobs").chunk(0)
    row = rows_from_table(make_table(9))[3]
    assert row.topk_logprobs.base is not None and not row.topk_logprobs.flags.owndata
    assert column.null_count == 0


def hidden_table(width=4):
    """Three rows of 2, 0 and 3 response tokens whose hidden states count up from 0."""
    lengths = (2, 0, 3)
    bits = np.arange(sum(lengths) * width, dtype=np.uint16).reshape(-1, width)
    parts = np.split(bits, np.cumsum(lengths)[:-1])
    columns = {
        "row": [0, 1, 2],
        "position": [0, 1, 2],
        "prompt_ids": [[1]] * 3,
        "response_ids": [[5] * n for n in lengths],
        "finish_reason": ["stop"] * 3,
        "sampled_logprobs": [[-1.0] * n for n in lengths],
    }
    hidden = [[state.tobytes() for state in part] for part in parts]
    table = pa.table(columns)
    return table.append_column("hidden", pa.array(hidden, pa.list_(pa.binary(2 * width)))), bits


def test_hidden_states_are_views_of_the_tables_buffers():
    table, bits = hidden_table()
    rows = rows_from_table(table)
    assert [row.hidden.shape for row in rows] == [(2, 4), (0, 4), (3, 4)]
    np.testing.assert_array_equal(np.concatenate([row.hidden for row in rows]), bits)
    address = table.column("hidden").chunk(0).values.buffers()[1].address
    assert rows[2].hidden.ctypes.data == address + bits[:2].nbytes
    assert rows[2].hidden.dtype == np.uint16
    (last,) = rows_from_table(table.slice(2))
    np.testing.assert_array_equal(last.hidden, bits[2:])
    assert rows_from_table(table.slice(1, 1))[0].hidden.shape == (0, 4)


def test_hidden_states_reach_the_micro_batch_as_bfloat16():
    table, _ = hidden_table()
    states = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = [row for row in rows_from_table(table) if len(row.response_ids)]
    for row, part in zip(rows, states.split([2, 3]), strict=True):
        row.hidden = part.view(torch.uint16).numpy()
    batch = collate(rows, "hidden", 60)
    assert torch.equal(batch.teacher_hidden, states) and batch.partition is None
    without_context = rows[1]
    without_context.prompt_ids = without_context.prompt_ids[:0]
    assert torch.equal(collate(rows, "hidden", 60).teacher_hidden, states[[0, 1, 3, 4]])
    moved = batch.to("meta")
    assert moved.teacher_hidden.device.type == "meta"
    rows[0].hidden = np.full((2, 4), 0x7FC0, np.uint16)
    with pytest.raises(ValueError, match=r"hidden state of token 0.*ask for it again"):
        collate(rows, "hidden", 60)
    rows[0].hidden = None
    with pytest.raises(ValueError, match=r"hidden is missing; expected one entry for each"):
        collate(rows, "hidden", 60)


def test_a_missing_signal_is_named():
    table = make_table(2)
    column = pa.array([None, [0.5]], pa.list_(pa.float32()))
    table = table.set_column(table.schema.get_field_index("tail_logprob"), "tail_logprob", column)
    with pytest.raises(ValueError, match="tail_logprob has 1 rows without a value"):
        rows_from_table(table)


def test_the_cut_keeps_the_budget_and_every_usable_row_once():
    generator = np.random.default_rng(1)
    rows = [
        make_row(i, [1] * generator.integers(1, 30), [1] * generator.integers(1, 40))
        for i in range(50)
    ]
    groups = cut_micro_batches(rows, 128)
    assert sorted(row.position for group in groups for row in group) == list(range(50))
    for group in groups:
        assert len(group) * max(row.num_inputs for row in group) <= 128
    assert len(groups) < 25


def test_the_cut_does_not_depend_on_the_order_of_arrival():
    rows = [make_row(i, [1] * (i % 4 + 1), [1] * (i % 3 + 1)) for i in range(20)]
    there = [[row.position for row in group] for group in cut_micro_batches(rows, 16)]
    back = [[row.position for row in group] for group in cut_micro_batches(rows[::-1], 16)]
    assert there == back


def test_a_row_longer_than_the_budget_stands_alone_and_an_empty_one_is_left_out():
    rows = [make_row(0, [1] * 9, [1] * 9), make_row(1, [1], [1]), make_row(2, [1, 2], [])]
    rows.append(make_row(3, [], [7]))  # its only token has no context
    groups = cut_micro_batches(rows, 8)
    assert [[row.position for row in group] for group in groups] == [[0], [1]]
    assert cut_micro_batches([], 8) == []
    assert loss_weight(rows, "row") == 2 and loss_weight(rows, "token") == 10


def test_five_tokens_are_shifted_by_one():
    # Prompt 11 12, response 13 14 15. Input positions 0..3 hold 11 12 13 14 (15 predicts nothing).
    # Position 1 (last prompt token) predicts 13, position 2 predicts 14, position 3 predicts 15.
    batch = collate([make_row(0, [11, 12], [13, 14, 15])], "text", 60)
    assert batch.input_ids.tolist() == [[11, 12, 13, 14]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]]
    assert batch.logit_index.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [13, 14, 15]
    assert batch.weights.tolist() == [1.0, 1.0, 1.0]


def test_rows_are_padded_on_the_right_and_indexed_in_the_flattened_batch():
    rows = [make_row(0, [11, 12], [13, 14, 15], signal=True), make_row(1, [21], [22], signal=True)]
    batch = collate(rows, "topk", 60)
    assert batch.input_ids.tolist() == [[11, 12, 13, 14], [21, 0, 0, 0]]
    assert batch.logit_index.tolist() == [1, 2, 3, 4]
    assert batch.targets.tolist() == [13, 14, 15, 22]
    assert batch.partition.ids.tolist() == [[13, 40, 50], [14, 41, 50], [15, 42, 50], [22, 40, 50]]
    assert (batch.input_tokens, batch.padded_tokens) == (5, 8)
    assert (batch.num_rows, batch.num_tokens) == (2, 4)


def test_without_a_prompt_the_first_token_has_no_context_and_no_loss():
    batch = collate([make_row(0, [], [13, 14, 15], signal=True)], "topk", 60)
    assert batch.input_ids.tolist() == [[13, 14]]
    assert batch.logit_index.tolist() == [0, 1]
    assert batch.targets.tolist() == [14, 15]
    assert batch.partition.ids[:, 0].tolist() == [14, 15]


@pytest.mark.parametrize("stop_id", [2, 0])
def test_the_stop_token_is_a_target_also_where_it_is_the_padding_id(stop_id):
    rows = [make_row(0, [11], [12, 13, stop_id]), make_row(1, [stop_id, 11], [stop_id])]
    batch = collate(rows, "text", 60)
    assert batch.targets.tolist() == [12, 13, stop_id, stop_id]
    assert (batch.weights == 1).all()
    assert batch.logit_index.tolist() == [0, 1, 2, 4]


def test_rows_weigh_the_same_when_normalised_by_row():
    rows = [make_row(0, [1], [2, 3, 4, 5]), make_row(1, [1], [2])]
    batch = collate(rows, "text", 60, normalise="row")
    assert batch.weights.tolist() == [0.25] * 4 + [1.0]
    assert loss_weight(rows, "row") == 2.0


def test_sampled_is_the_partition_of_the_drawn_token():
    batch = collate([make_row(0, [11], [12, 13], signal=True)], "sampled", 60)
    assert batch.partition.ids.tolist() == [[12], [13]]
    torch.testing.assert_close(batch.partition.log_p.exp(), torch.full((2, 2), 0.5))


def test_ids_the_student_lacks_are_tail_in_the_signal_and_an_error_in_the_text():
    row = make_row(0, [11], [12, 13], signal=True)
    assert collate([row], "topk", 50).partition.ids[:, 2].tolist() == [NO_ID, NO_ID]
    with pytest.raises(ValueError, match=r"row 0 has token id 13 .* vocabulary ends at 13"):
        collate([row], "topk", 13)


def test_an_incomplete_signal_is_refused():
    row = make_row(7, [11], [12, 13], signal=True)
    row.tail_logprob = row.tail_logprob[:1]
    with pytest.raises(ValueError, match=r"row 7: tail_logprob is 1 long; expected .* 2"):
        collate([row], "topk", 60)
    with pytest.raises(ValueError, match="row 7: sampled_logprobs is missing"):
        collate([make_row(7, [11], [12])], "sampled", 60)


@pytest.mark.parametrize("kind", ["text", "sampled", "topk", "hidden"])
def test_a_dummy_is_one_token_without_weight(kind):
    batch = dummy_micro_batch(kind, 4)
    assert batch.weights.tolist() == [0.0]
    assert (batch.num_rows, batch.num_tokens) == (0, 0)
    assert (batch.partition is None) == (kind in ("text", "hidden"))
    assert kind != "hidden" or batch.teacher_hidden.tolist() == [[0.0] * 4]
