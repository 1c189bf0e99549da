"""What two scripts both define is the same text in both: one fix is one `sed`, and a diff shows the papers alone."""

import ast
import difflib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from conftest import ROOT, SCRIPTS

OWN = ("Args", "Agent", "train")  # definitions in which the scripts differ
EXCUSED_FIELDS = {
    "exp_name": "the script's own name",
    "domain_values": "each algorithm's own hyper-parameters",
}
EXCUSED_LINES = {  # in setup, offline and finish of `train`: pattern, reason
    r"learner = |explorer = |gate = |acting = |evaluator = |run\.start\(": "online parts are built with the others",
    r"optimistic|start_values": "cal_ql's values start where the data's returns say",
    r"save_file|online\.pt|identity|parts = |^[+-]\s*\)$|run\.finish|never stable|evaluator\.": "and saved with them",
}
ALL = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
PAIRS = pytest.mark.parametrize(
    "pair", list(combinations(SCRIPTS, 2)), ids=lambda pair: f"{pair[0].stem}-{pair[1].stem}"
)


def definitions(source: str) -> dict[str, str]:
    """Top-level names in order, each with its text: whole lines, decorators and the comment above included."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        name = ", ".join(getattr(target, "name", getattr(target, "id", "")) for target in targets)
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].startswith("#"):
            first -= 1
        if name:
            found[name] = "\n".join(lines[first : node.end_lineno])
    return found


def imports(source: str) -> str:
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(source.splitlines()[nodes[0].lineno - 1 : nodes[-1].end_lineno])


def unmarked(text: str) -> str:
    """Without the marks of departures: each script has its own list."""
    return re.sub(r" ?\[D\d+\]", "", text)


def fields(source: str) -> dict[str, str]:
    lines, args = source.splitlines(), next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args")
    found = {n.target.id: lines[n.lineno - 1 : n.end_lineno] for n in args.body if isinstance(n, ast.AnnAssign)}
    return {name: unmarked("\n".join(text)) for name, text in found.items() if name not in EXCUSED_FIELDS}


def sections(source: str) -> dict[str, list[str]]:
    parts = re.split(r"^    # ---- (\w+) ----\n", definitions(source)["train"], flags=re.M)[1:]
    return {name: unmarked(text).strip().splitlines() for name, text in zip(parts[::2], parts[1::2], strict=True)}


@PAIRS
def test_shared_definitions_are_the_same_text(pair):
    a, b = (definitions(path.read_text()) for path in pair)
    shared = [name for name in a if name in b]
    assert shared == [name for name in b if name in a], "shared names stand in another order"
    assert [name for name in shared if name not in OWN and a[name] != b[name]] == []
    assert imports(pair[0].read_text()) == imports(pair[1].read_text())


@PAIRS
def test_shared_args_have_the_same_default_and_comment(pair):
    a, b = (fields(path.read_text()) for path in pair)
    assert {name: (a[name], b[name]) for name in a if name in b and a[name] != b[name]} == {}


def test_iql_is_the_same_in_three_scripts():
    names = "iql_finetune", "jsrl_gated", "sft_reset"
    assert len({unmarked(definitions((ROOT / f"{name}.py").read_text())["Agent"]) for name in names}) == 1
    first, *others = (importlib.import_module(name).Args.domain_values for name in names)
    of_iql = set().union(*first.values())
    for values in others:
        assert {domain: {k: row[k] for k in row if k in of_iql} for domain, row in values.items()} == first


@PAIRS
@pytest.mark.parametrize("section", ["setup", "offline", "finish"])
def test_shared_sections_of_train_differ_only_where_excused(pair, section):
    a, b = (sections(path.read_text())[section] for path in pair)
    differing = [line for line in difflib.unified_diff(a, b, n=0, lineterm="") if re.match(r"[+-](?![+-])", line)]
    assert [line for line in differing if not any(re.search(pattern, line) for pattern in EXCUSED_LINES)] == []


@ALL
@pytest.mark.xfail(reason="the cap is not reached yet: some 830 to 1,400 lines", strict=True)
def test_script_is_short(script):
    assert len(script.read_text().splitlines()) <= 500


@ALL
def test_script_is_in_order(script):
    source = script.read_text()
    assert list(sections(source)) == ["setup", "offline", "online", "finish"]
    assert list(definitions(source))[-1] == "train"


@ALL
def test_help_of_a_copy_alone_in_an_empty_folder(script, tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(script, folder)
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, script.name, "--help"]
    process = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "--env-id" in process.stdout and "--offline-steps" in process.stdout
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == [script.name]


@ALL
def test_import_has_no_side_effect(script, tmp_path, capsys, monkeypatch):
    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
        torch_state = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.initial_seed()
        return sorted(tmp_path.rglob("*")), dict(os.environ), handlers, torch_state

    spec = importlib.util.spec_from_file_location("imported_afresh", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "imported_afresh", module)
    spec.loader.exec_module(module)  # once for the side effects of the libraries, which are not ours
    capsys.readouterr()
    before = state()
    spec.loader.exec_module(module)
    assert state() == before
    assert capsys.readouterr() == ("", "")
    assert callable(module.train)
