"""Every script on a CUDA device, where there is one: whole runs, with and without graphs, stopped and resumed."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_run_is_finite_and_repeats_itself(script, graph, toy_args):
    module = importlib.import_module(script.stem)
    args = toy_args | {"cuda": True, "cuda_graph": graph}
    one, other = (module.train(module.Args(**args, exp_name=name)) for name in ("one", "other"))
    assert one["device"] == "cuda" and all(math.isfinite(one[key]) for key in ("offline_score", "final_score"))
    assert (one["offline_score"], one["final_score"]) == (other["offline_score"], other["final_score"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_run_with_graphs_is_continued(script, toy_args, monkeypatch):
    module = importlib.import_module(script.stem)
    args = toy_args | {"cuda": True, "cuda_graph": True, "save_every": 20}
    save, saves = module.Run.save, []

    def stopping(run):
        saves.append(run.progress["online_step"])
        run.stop = saves[-1] > 30
        save(run)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module.Run, "save", stopping)
        module.train(module.Args(**args))
    summary = module.train(module.Args(**args, resume=True))
    assert 30 < saves[-1] < summary["online_steps"] and math.isfinite(summary["final_score"])
    saved = torch.load(next(Path(args["run_dir"]).glob("*/online.pt")), weights_only=True)
    learned = [value for part in saved.values() if isinstance(part, dict) for value in part.values()]
    assert all(value.isfinite().all() for value in learned if torch.is_tensor(value) and value.is_floating_point())
