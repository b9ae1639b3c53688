"""Every command and every piece of code in README and docs is run, or checked as far as it can be without a GPU."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from launch import cli, errors
from launch.config_load import load_config, split_worker_args
from launch.errors import EXIT_DONE, ConfigError
from tests.launch.runs import settings, train_worker, write_corpus
from tests.processes import run_ranks
from tools.bench.step_cases import Case

ROOT = Path(__file__).parent.parent
TYPER_TOOLS = (
    "tools.bench_attention",
    "tools.bench_kernels",
    "tools.bench_layer",
    "tools.bench_payload",
    "tools.bench_step",
    "tools.overwritten_variables",
    "tools.ring_error",
    "tools.simulate_ring",
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    for page in PAGES:
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL):
            yield page.name, block


def commands():
    for page, block in blocks("sh"):
        yield from ((page, line) for line in block.strip().splitlines())
    for page in PAGES:  # commands in the cells of a table
        for line in page.read_text().splitlines():
            if line.startswith("|"):
                yield from (
                    (page.name, found)
                    for found in re.findall(r"`((?:python -m|torchrun|deepspeed|sbatch) [^`]+)`", line)
                )


COMMANDS = sorted(set(commands()))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run that stands for the runs/... that the commands name."""
    folder = tmp_path_factory.mktemp("docs")
    run = settings(
        write_corpus(folder), folder / "run", optim__steps=1, optim__warmup_steps=0, checkpoint__save_last=True
    )
    assert run_ranks(train_worker, 1, [run]) == [[EXIT_DONE]]
    return folder / "run"


def check_worker(words):
    """The arguments of a worker: `CONFIG section.key=value ...`."""
    path, overrides = split_worker_args(words[words.index("launch.train") + 1 :])
    load_config(str(ROOT / path), overrides)


def step_cases(given):
    """Of the options of `tools.bench_step`."""
    variants = given["variants"].split(",")
    assert set(variants) <= {"ours", "rival"}
    return [
        Case(
            variant=variants[0],
            model=given["model"],
            size=given["nproc"],
            tokens=int(tokens),
            overrides=tuple(given["overrides"] or ()),
            keep_documents=given["keep_documents"],
        )
        for tokens in given["tokens"].split(",")
    ]


def build(cases, precision, tmp_path):
    """The configurations of cases that are run on GPUs (in fp32 on CPUs): a wrong name or value is an error."""
    for case in cases:
        case.config(device="cpu" if precision == "fp32" else "cuda", folder=tmp_path, timeout_seconds=60.0)


def check(command, run_dir, tmp_path, monkeypatch):
    words = shlex.split(command)
    monkeypatch.chdir(ROOT)
    if words[0] == "make":
        assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0
    elif words[0] in ("torchrun", "deepspeed"):
        if any(word.startswith("tools.") for word in words):
            ranks = words[words.index("--nproc_per_node") + 1] if "tools.bench_step" in words else None
            given = [*words[words.index("-m") + 1 :], *(("--nproc", ranks) if ranks else ())]
            check(f"python -m {shlex.join(given)}", run_dir, tmp_path, monkeypatch)
        else:
            check_worker(words)
    elif words[0] == "sbatch":
        assert (ROOT / words[1]).is_file()
        load_config(str(ROOT / words[2]), [f"run.dir={words[3]}", *words[4:]])
    elif words[:3] == ["python", "-m", "pytest"]:
        found = subprocess.run([sys.executable, *words[1:], "--collect-only"], cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr  # 5: no such test
    elif words[:3] == ["python", "-m", "launch"]:
        extra = [] if {"--plan", "--print-config"} & set(words) else ["--print-config"]
        assert cli.main([*words[3:], *extra]) == EXIT_DONE
    elif words[:3] == ["python", "-m", "tools.ckpt"]:
        from tools.ckpt import app

        replaced = [str(run_dir) if word.startswith("runs/") else word for word in words[3:]]
        replaced = [str(tmp_path / word) if word.endswith(".safetensors") else word for word in replaced]
        with pytest.raises(SystemExit) as ended:
            app(replaced)
        assert ended.value.code == 0
    elif words[:3] == ["python", "-m", "tools.draw_plan"]:
        from tools.draw_plan import app

        target = tmp_path / "plan.svg"
        replaced = [str(target) if word.endswith(".svg") else word for word in words[3:]]
        with pytest.raises(SystemExit) as ended:
            app(replaced)
        assert ended.value.code == 0
        committed = (ROOT / words[-1]).read_text()
        assert committed.count("<path") == target.read_text().count("<path"), "docs/ring.svg is not what this draws"
    elif words[:3] == ["python", "-m", "tools.scaling_report"]:
        from tools.scaling_report import main, parse, wanted_cases

        options = parse(words[3:])
        if options.records and all(path.is_file() for path in options.records):
            assert main([*words[3:], "--out", str(tmp_path / "report")]) == 0
        elif not options.records:  # measured for real in tests/tools/test_scaling_report.py
            build(wanted_cases(options, options.preset or "test"), options.precision, tmp_path)
    elif words[:3] == ["python", "-m", "tools.bench_selection"]:
        from tools.bench_selection import _parser as selection_parser

        selection_parser().parse_args(words[3:])  # needs CUDA
    elif words[:3] == ["python", "-m", "tools.plan_memory"]:
        from tools.plan_memory import app

        with pytest.raises(SystemExit) as ended:
            app(words[3:])
        assert ended.value.code == 0
    elif words[:2] == ["python", "-m"] and words[2] in TYPER_TOOLS:
        # run for real in tests/tools; here the options are checked
        command = typer.main.get_command(importlib.import_module(words[2]).app)
        given = command.make_context(words[2], words[3:]).params
        if words[2] == "tools.bench_step":
            build(step_cases(given), "bf16", tmp_path)
    else:
        raise AssertionError(f"no test knows how to run {command!r}: add it here")


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_commands(page, command, run_dir, tmp_path, monkeypatch, capsys):
    check(command, run_dir, tmp_path, monkeypatch)


def test_there_are_commands_and_a_wrong_one_is_noticed(run_dir, tmp_path, monkeypatch, capsys):
    assert len(COMMANDS) >= 10
    assert cli.main(["train", "configs/quickstart.yaml", "optim.stepz=3", "--print-config"]) != EXIT_DONE
    with pytest.raises(AssertionError, match="no test knows"):
        check("curl somewhere", run_dir, tmp_path, monkeypatch)
    steps, report = "torchrun --nproc_per_node 4 -m tools.bench_step", "python -m tools.scaling_report"
    for command, error in (
        (f"{steps} --tokens 64 --out DIR memory.recomputee=true", "did you mean memory.recompute"),
        (f"{steps} --tokens 64 --out DIR --model nope", "nope"),
        (f"{steps} --tokens 64 --out DIR --variants our", "our"),
        (f"{report} --cp 1,2 --seq-len 64 --precision bf16 --out DIR model.layerss=3", "did you mean model.layers"),
    ):
        with pytest.raises((AssertionError, KeyError, ConfigError), match=error):
            check(command, run_dir, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("page", "code"), list(blocks("python")), ids=lambda value: value if len(value) < 30 else "code"
)
def test_code(page, code):
    exec(compile(code, page, "exec"), {})


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_failures_page_has_every_exit_status_once():
    statuses = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    table = re.findall(r"^\| (\d+) \|", (ROOT / "docs/failures.md").read_text(), re.MULTILINE)
    assert sorted(statuses) == [int(status) for status in table]


def test_tests_named_in_the_failures_page_exist():
    for name in re.findall(r"`(tests/[^`]+)`", (ROOT / "docs/failures.md").read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_a_table_is_one_block_with_a_head(page):
    """A blank line inside ends it: what follows would be shown as text. Cells are as many in every line."""
    text = re.sub(r"```.*?```", "", next(p for p in PAGES if p.name == page).read_text(), flags=re.DOTALL)
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        lines = block.splitlines()
        assert len(lines) > 2, lines[0]
        assert re.fullmatch(r"\|(?:\s*:?-+:?\s*\|)+", lines[1]), lines[0]
        cells = [len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in lines]
        assert len(set(cells)) == 1, [line for line, n in zip(lines, cells, strict=True) if n != cells[0]]
