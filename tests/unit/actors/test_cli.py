"""The command line: verbs, overrides, statuses, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import configs
from actors import cli
from services.errors import DataError

ROOMS = ["data.rooms.scenes=3", "data.rooms.views=2", "data.rooms.width=32", "data.rooms.height=24"]

#: Arguments that a trained model is used with.
USED = [
    "--config", "--debug", "overrides", "--run", "--view", "--pose", "--yaw", "--pitch", "--roll", "--move",
    "--trajectory", "--target-view", "--part", "--device",
]  # fmt: skip

#: The public surface: a verb is added or removed on purpose, and CHANGELOG.md says so.
VERBS = {
    "train": ["--config", "--debug", "overrides"],
    "plan": ["--address", "--config", "--debug", "--json", "--rates", "--strategies", "overrides"],
    "evaluate": ["--config", "--debug", "--run", "--split", "overrides"],
    "generate": sorted([*USED, "--image", "--out"]),
    "ask": sorted(
        [
            *USED,
            "--image",
            "--out",
            "--question",
            "--questions",
            "--caption",
            "--imagine",
            "--after-reference",
            "--json",
            "--video",
            "--like",
        ]
    ),
    "show-field": ["--config", "--debug", "--out", "--run", "--scene", "--sets", "--split", "overrides"],
    "export": ["--config", "--debug", "--licence", "--merge", "--out", "--run", "overrides"],
    "data make": ["--config", "--debug", "--out", "overrides"],
    "data index": ["--config", "--debug", "overrides"],
    "data check": ["--against", "--config", "--debug", "--out", "overrides"],
    "data pairs": ["--config", "--debug", "--out", "overrides"],
    "data questions": ["--config", "--debug", "--out", "overrides"],
    "data show": ["--config", "--debug", "--out", "overrides", "scene"],
    "features warm": ["--config", "--debug", "--encoder", "--source", "--split", "overrides"],
    "features stats": ["--config", "--debug", "overrides"],
    "features verify": ["--config", "--debug", "--encoder", "--sample", "--tolerance", "overrides"],
    "features why": ["--config", "--debug", "--encoder", "overrides", "sample"],
    "features gc": ["--budget", "--config", "--debug", "--keep", "overrides"],
    "report": ["--against", "--debug", "run"],
    "config show": ["--config", "--debug", "overrides"],
    "config keys": ["--debug", "pattern"],
    "models": ["--debug", "pattern"],
}


def test_verbs_and_their_arguments_are_the_frozen_ones() -> None:
    found = {}
    for name, verb in cli.VERBS.items():
        actions = cli._parser(name, verb)._actions
        found[name] = sorted(a.option_strings[-1] if a.option_strings else a.dest for a in actions if a.dest != "help")
    assert found == VERBS


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    for name, verb in cli.VERBS.items():
        assert name in text
        assert verb.help in text


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*name.split(), "--help"])
    assert left.value.code == 0
    assert f"usage: loom3d {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["no verb `trian`", "Did you mean `loom3d train`?", "Verbs: train, plan"]),
        (["config", "shw"], ["no verb `config shw`", "`loom3d config show`"]),
        (["train", "recipe=prob"], ["recipe=prob", "Did you mean probe?"]),
        (["train", "trainer.lr=fast"], ["trainer.lr must be a number"]),
        (["plan", "--config", "/absent.yaml"], ["/absent.yaml: cannot be read"]),
        (["plan", "model.name=probe-huge"], ["probe-huge", "probe-tiny"]),
        (["plan", "encoders.features.weights=/absent", "~encoders.features.arch"], ["WeightsError", "/absent"]),
        (["plan", "data=scannet", "data.sources.scannet.root=/absent"], ["DataError", "/absent"]),
        (["plan", "--rates", "/absent"], ["DataError", "/absent", "events"]),
        (["data", "check", "--against", "scannet"], ["--against scannet: write NAME=FILE"]),
        (["data", "make", "storage.root=s3://b/x", "cache.root=/c"], ["storage.root='s3://b/x' is a URI"]),
        (["report", "/absent"], ["/absent"]),
        (["features", "stats", "cache=off"], ["cache.mode=never stores nothing", "cache=local"]),
        (["features", "gc"], ["--keep NAME, --budget BYTES"]),
    ],
)
def test_user_errors_are_one_message_and_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    for word in words:
        assert word in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.startswith("loom3d: ")


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(configs.ConfigError):
        cli.main(["config", "show", "recipe=prob", "--debug"])


def test_an_unknown_option_is_refused_by_argparse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--nonsense"])
    assert left.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


def test_options_and_overrides_mix(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "size=tiny", "--debug", "trainer.lr=3e-4"]) == 0
    config = configs.from_yaml(capsys.readouterr().out)
    assert config.trainer.lr == 3e-4


def test_a_shown_configuration_is_loaded_with_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "size=small", "seed=5"]) == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert cli.main(["config", "show", "--config", str(file), "trainer.steps=9", "trainer.warmup_steps=2"]) == 0
    again = configs.from_yaml(capsys.readouterr().out)
    assert (again.seed, again.size, again.trainer.steps) == (5, "small", 9)


def test_config_keys_prints_comments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "keys", "trainer.lr"]) == 0
    text = capsys.readouterr().out
    assert "trainer.lr: float = 0.001" in text
    assert "Peak learning rate" in text
    assert "encoders" not in text


def test_models_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "probe-*"]) == 0
    text = capsys.readouterr().out
    assert "probe-tiny" in text
    assert "roles: trainer" in text
    assert cli.main(["models", "nothing-*"]) == 1
    assert "there are" in capsys.readouterr().out


def test_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "models", cli.Verb(interrupted, "", configured=False))
    assert cli.main(["models"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(args: object) -> int:
        raise KeyError("ours")

    monkeypatch.setitem(cli.VERBS, "models", cli.Verb(wrong, "", configured=False))
    with pytest.raises(KeyError):
        cli.main(["models"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileExistsError(17, "File exists", "/data/x"), "/data/x: File exists"),
        (OSError(28, "No space left on device"), "the disk: No space left on device"),
        (OSError(30, "Read-only file system", "/a", None, "/b"), "/a -> /b: Read-only file system"),
    ],
)
def test_files_and_disks_are_for_the_user_to_change(
    error: OSError, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(args: object) -> int:
        raise error

    monkeypatch.setitem(cli.VERBS, "models", cli.Verb(broken, "", configured=False))
    assert cli.main(["models"]) == 2
    assert capsys.readouterr().err.startswith(f"loom3d: {words}; ")


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(args: object) -> int:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setitem(cli.VERBS, "models", cli.Verb(wrong, "", configured=False))
    with pytest.raises(ConnectionResetError):
        cli.main(["models"])


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m actors config keys | head -1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=Path(cli.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("name: str")
    assert result.stderr == ""


def test_data_verbs_make_index_and_check_rooms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"storage.root={tmp_path}", *ROOMS]
    assert cli.main(["data", "make", *overrides]) == 0
    assert "3 rooms of 2 views" in capsys.readouterr().out
    assert cli.main(["data", "index", *overrides]) == 0
    assert "3 entries, 6 views" in capsys.readouterr().out
    status = cli.main(["data", "check", *overrides])
    assert status in (0, 1)
    assert (tmp_path / "checks" / "rooms" / "report.html").exists()
    assert cli.main(["data", "questions", *overrides]) == 0
    assert list((tmp_path / "questions" / "rooms").glob("*.jsonl"))
    # Two views of a room lie at its ends, so that none of them need be a pair at the default bounds.
    assert cli.main(["data", "pairs", "data.pairs.min_overlap=0.01", *overrides]) == 0
    assert "pairs of 3 scenes" in capsys.readouterr().out
    assert (tmp_path / "pairs" / "rooms" / "pairs.html").exists()
    assert cli.main(["data", "pairs", "data.pairs.min_overlap=0.94", *overrides]) == 1
    assert "3 of 3 scenes have no pairs" in capsys.readouterr().out


def test_features_verbs_warm_verify_explain_and_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"storage.root={tmp_path}", *ROOMS]
    assert cli.main(["features", "warm", *overrides]) == 0
    assert "encoded         6" in capsys.readouterr().out
    assert cli.main(["features", "warm", "--source", "room", *overrides]) == 2
    assert "no such source; there are rooms" in capsys.readouterr().err
    assert cli.main(["features", "stats", *overrides]) == 0
    assert "Dinov2Model" in capsys.readouterr().out
    assert cli.main(["features", "verify", "--sample", "2", *overrides]) == 0
    assert "2 inputs encoded again" in capsys.readouterr().out
    assert cli.main(["features", "why", "rooms/room0_0000:1", *overrides]) == 0
    assert "stored" in capsys.readouterr().out
    assert cli.main(["features", "why", "rooms/room0_0000:1", "encoders.features.seed=7", *overrides]) == 1
    assert "fingerprint" in capsys.readouterr().out
    assert cli.main(["features", "gc", "--budget", "0", *overrides]) == 0
    assert cli.main(["features", "why", "rooms/room0_0000:1", *overrides]) == 1
    assert cli.main(["data", "show", "room0_0000", *overrides]) == 0
    assert (tmp_path / "show" / "room0_0000" / "index.html").exists()


def test_plan_json_can_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["plan", "--json", f"storage.root={tmp_path}"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    assert plan["cache"]["records"] == 40 * 8
    assert cli.main(["plan", f"storage.root={tmp_path}", "cluster.nodes.local.memory_gb=0.5"]) == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_train_prints_where_the_report_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from actors import driver

    seen = []

    def train(config: configs.RunConfig) -> driver.RunResult:
        seen.append(config)
        psnr = {"value": 15.0, "baseline": 13.5, "baseline_name": "mean picture", "better": "higher"}
        return driver.RunResult(
            folder=tmp_path, metrics={"rgb/psnr": psnr}, report=tmp_path / "report" / "index.html", steps=2,
            resumed_from=0,
        )  # fmt: skip

    monkeypatch.setattr(driver, "train", train)
    assert cli.main(["train", "trainer=smoke", f"storage.root={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "report" / "index.html") in said
    assert "rgb/psnr (dB) 15 mean picture 13.5" in " ".join(said.split())
    assert seen[0].trainer.steps == 2


def test_train_passes_on_named_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from actors import driver

    def train(config: configs.RunConfig) -> driver.RunResult:
        raise DataError("/a/b.png is broken")

    monkeypatch.setattr(driver, "train", train)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "loom3d: DataError: /a/b.png is broken\n"
