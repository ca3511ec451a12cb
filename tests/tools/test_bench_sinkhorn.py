"""The baselines of the Sinkhorn benchmark solve the same problem as ours."""

import json

import pytest
import torch

from selfguide.distributed import RankInfo
from selfguide.sinkhorn import sinkhorn
from tools.bench import __main__ as command
from tools.bench.sinkhorn import FORMS, cosines
from tools.ranks import run_ranks


def codes(rank_info: RankInfo) -> dict[str, list]:
    return {
        name: form(cosines(8, 20, seed=rank_info.rank)).tolist() for name, form in FORMS.items()
    }


def test_every_form_gives_the_codes_of_one_process() -> None:
    whole = torch.cat([cosines(8, 20, seed=rank) for rank in range(2)])
    wanted = sinkhorn(whole, group="local")
    answers = run_ranks(2, codes)
    for name in FORMS:
        found = torch.tensor([row for answer in answers for row in answer[name]])
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0, msg=name)


@pytest.mark.slow
def test_the_suite_runs_and_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["sinkhorn", "--repeats", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["suites"]["sinkhorn"]
    assert len(rows) == 2 * 3 * 3 * (len(FORMS) + 1)
    assert all(row["median"] > 0 for row in rows)
