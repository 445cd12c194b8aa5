"""A teacher judged one layer at a time: the same choice, and never more than a layer's copies."""

import pytest
import torch

from raystill.config.student import StudentConfig
from raystill.train.start.cut import layer_list
from raystill.train.start.shape import choose_shape
from raystill.train.start.streamed import fits_whole, one_layer_at_a_time, whole_on
from tests.train.test_refit import teacher, texts

CPU = torch.device("cpu")


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("by", ["influence", "importance"])
def test_what_is_chosen_and_fitted_is_the_same_and_one_layer_is_copied(
    by: str, refit: bool
) -> None:
    student = StudentConfig.model_validate(
        {"init": "from_teacher", "layers": {"keep": 3, "by": by}, "refit": refit}
    )
    given, model = texts(), teacher()
    layers = list(layer_list(model)[2])
    host = {id(p): p.data_ptr() for p in model.parameters()}
    copied: set[int] = set()

    def look(number: int):
        def hook(*_: object) -> None:
            now = [
                i
                for i, layer in enumerate(layers)
                if any(p.data_ptr() != host[id(p)] for p in layer.parameters())
            ]
            assert now == [number], "the one that runs, and no other"
            copied.add(number)

        return hook

    with one_layer_at_a_time(model, CPU):
        hooks = [one.register_forward_hook(look(i)) for i, one in enumerate(layers)]
        found = choose_shape(student, model, given)
        for hook in hooks:
            hook.remove()
    assert copied == set(range(len(layers)))
    assert all(p.data_ptr() == host[id(p)] for p in model.parameters()), "as it was"
    with whole_on(model, CPU):
        expected = choose_shape(student, model, given)
    assert found.shape.layers == expected.shape.layers
    assert found.layers == expected.layers
    assert found.shape.fitted.keys() == expected.shape.fitted.keys()
    assert bool(found.shape.fitted) == refit
    for number, weight in expected.shape.fitted.items():
        assert torch.equal(found.shape.fitted[number], weight)


def test_a_failure_leaves_the_teacher_as_it_was() -> None:
    model = teacher()
    host = [p.data_ptr() for p in model.parameters()]

    def fail(*_: object) -> None:
        raise RuntimeError("no more memory")

    hook = layer_list(model)[2][2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no more"), one_layer_at_a_time(model, CPU):
        model(torch.arange(5)[None])
    hook.remove()
    assert [p.data_ptr() for p in model.parameters()] == host
    assert fits_whole(model, CPU)
