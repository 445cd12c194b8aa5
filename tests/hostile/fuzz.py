"""Fuzzing: hostile cases for as long as there is time, over the same generators as the tests.

One process that stays takes a kind of case after the other, a seed for each round. What it finds is
made smaller and printed, with the command that finds it again, and its files are kept.

    python -m tests.hostile.fuzz                    # ten minutes, a seed of its own
    python -m tests.hostile.fuzz --minutes 1 --seed 7 --kind stores

Exit status 1 where anything was found.
"""

import argparse
import contextlib
import faulthandler
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis.errors import FlakyFailure
from hypothesis.internal.conjecture import engine

from tests.hostile.generators import KINDS
from tests.hostile.judge import Case, judge, write
from tests.hostile.places import Bases

ROUND_CASES = 40
"""Cases of a kind between two looks at the clock."""
SHRINK_S = 45
"""Seconds in which a finding is made smaller at most."""
HUNG_S = 90
"""Seconds after which a case that is still at work ends the process, with its stack."""
PHASES = (Phase.generate, Phase.shrink)
QUIET = settings(
    database=None,
    deadline=None,
    phases=PHASES,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


class Found(Exception):
    """A case that was not answered as it should be."""

    def __init__(self, case: Case, wrong: list[str]) -> None:
        super().__init__("; ".join(wrong))
        self.case, self.wrong = case, wrong


class Fuzzer:
    """Rounds of cases in one folder; counts them, and keeps what is found."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bases = folder, Bases(folder)
        self.cases: Counter[str] = Counter()
        self.found: list[str] = []

    def round(self, kind: str, seed: int) -> None:
        """Cases of one kind with one seed; what is found is printed, made smaller."""

        @with_seed(seed)
        @settings(QUIET, max_examples=ROUND_CASES)
        @given(KINDS[kind])
        def try_all(case: Case) -> None:
            self.cases[kind] += 1
            faulthandler.dump_traceback_later(HUNG_S, exit=True, file=sys.__stderr__)
            try:
                wrong = judge(case, self.bases.fresh(case.base))
            except Exception as error:  # Past the command's own last resort.
                wrong = [f"{type(error).__name__}: {error}"]
            finally:
                faulthandler.cancel_dump_traceback_later()
            if wrong:
                raise Found(case, wrong)

        try:
            try_all()
        except Found as found:
            self.tell(kind, seed, found)
        except FlakyFailure as flaky:  # Not so the second time.
            for found in flaky.exceptions:
                assert isinstance(found, Found), found
                self.tell(kind, seed, found)

    def tell(self, kind: str, seed: int, found: Found) -> None:
        """Print a finding, and keep its files."""
        place = self.folder / f"finding-{len(self.found) + 1}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        with contextlib.suppress(OSError, ValueError):
            write(place, found.case.files)
        self.found.append(kind)
        again = f"python -m tests.hostile.fuzz --kind {kind} --seed {seed} --rounds 1"
        print(f"FOUND {kind}: {'; '.join(found.wrong)}")
        print(f"  command: raystill {ascii(shlex.join(found.case.words))[1:-1][:600]}")
        for name, content in found.case.files.items():
            print(f"  {name}: {ascii(content)[:600]}")
        print(f"  files: {place} (over the base {found.case.base!r}); again: {again}", flush=True)


def main() -> int:
    """Fuzz; the exit status."""
    options = arguments()
    engine.MAX_SHRINKING_SECONDS = SHRINK_S
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    kinds = [options.kind] if options.kind else list(KINDS)
    fuzzer = Fuzzer(Path(tempfile.mkdtemp(prefix="raystill-fuzz-")))
    end = time.monotonic() + 60 * options.minutes
    again = f"--seed {seed}{f' --kind {options.kind}' if options.kind else ''}"
    print(f"seed {seed}: python -m tests.hostile.fuzz {again} repeats this", flush=True)
    rounds = 0
    while time.monotonic() < end and (options.rounds is None or rounds < options.rounds):
        for kind in kinds:
            fuzzer.round(kind, seed + rounds)
            if time.monotonic() > end:
                break
        rounds += 1
    cases = ", ".join(f"{number} {kind}" for kind, number in fuzzer.cases.items())
    print(f"{sum(fuzzer.cases.values())} cases ({cases}), {len(fuzzer.found)} findings")
    if not fuzzer.found:
        shutil.rmtree(fuzzer.folder)
    return 1 if fuzzer.found else 0


def arguments() -> argparse.Namespace:
    """The command line; FUZZ_MINUTES and FUZZ_SEED are its defaults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    minutes, seed = os.environ.get("FUZZ_MINUTES", "10"), os.environ.get("FUZZ_SEED")
    parser.add_argument("--minutes", type=float, default=float(minutes))
    parser.add_argument("--seed", type=int, default=int(seed) if seed else None)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--rounds", type=int, help="stop after so many")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
