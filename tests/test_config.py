"""Files, overrides, recording: what is accepted, and the one line that refuses the rest."""

import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from vlm import config as configs
from vlm import schema
from vlm.errors import UserError

PROGRAM = """
from ml_collections import ConfigDict
def get_config(size="base"):
    config = ConfigDict()
    config.family = "altclip"
    config.model = dict(vision=dict(hidden_size={"tiny": 8, "base": 16}[size], dropout_rate=0.0, name="x", init=None))
    config.data = dict(sources=(dict(kind="tar", path="a", weight=1.0),))
    config.optimizer = dict(groups=(("vision/.*", dict(freeze=True)), (".*", {})))
    return config
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def read(program, *overrides, size=":tiny"):
    return configs.parse_config_flag(f"{program}{size}", overrides)


def test_file_argument_defaults_and_overrides(program):
    config = read(
        program,
        "--config.optimizer.lr=2",
        "--config.optimizer.betas=(0.8, 0.9)",
        "--config.optimizer.grad_clip_norm=1.5",
        "--config.train.steps=0x10",
        "--config.model.vision.drop_path_rate=0.25",
        "--config.model.vision.init=normal",
        "--config.data.sources[0].path=/b",
        "--noconfig.train.tensorboard",
    )
    built = configs.build(schema.Config, config, "")
    assert built.model["vision"]["hidden_size"] == 8
    assert built.optimizer.lr == 2.0 and isinstance(built.optimizer.lr, float)
    assert built.optimizer.betas == (0.8, 0.9)
    assert built.optimizer.grad_clip_norm == 1.5 and built.optimizer.ema_decay is None
    assert built.train.steps == 16 and built.train.keep == schema.TrainConfig.keep
    assert built.train.tensorboard is False
    assert built.model["vision"]["drop_path_rate"] == 0.25 and built.model["vision"]["init"] == "normal"
    assert built.data.sources == ({"kind": "tar", "path": "/b", "weight": 1.0},)
    assert built.optimizer.groups[0] == ("vision/.*", schema.GroupConfig(freeze=True))
    assert read(program, size="").model.vision.hidden_size == 16


def test_none_is_none_and_can_be_undone(program):
    config = read(program, "--config.optimizer.grad_clip_norm=1.0", "--config.optimizer.grad_clip_norm=None")
    assert config.optimizer.grad_clip_norm is None
    config = read(program, "--config.model.vision.name=None")
    assert config.model.vision.name is None
    with pytest.raises(UserError, match=r"config\.optimizer\.lr: expected float, found None"):
        configs.build(schema.Config, read(program, "--config.optimizer.lr=None"), "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optimizer.lrr=1", r"config\.optimizer\.lrr does not exist; did you mean 'lr'\?"),
        ("--config.optimzer.lr=1", r"config\.optimzer does not exist; did you mean 'optimizer'\?"),
        ("--config.train.steps=2.5", r"config\.train\.steps: expected int, found '2.5'"),
        ("--config.train.steps=many", r"config\.train\.steps: expected int, found 'many'"),
        ("--config.train.tensorboard=perhaps", r"config\.train\.tensorboard: expected bool, found 'perhaps'"),
        ("--config.optimizer.lr.value=1", r"config\.optimizer\.lr\.value does not exist"),
        ("--config.data.sources[4].path=x", r"config\.data\.sources\.4 does not exist"),
        ("--config..lr=1", r"expected --config\.section\.key=value"),
        ("--config.model.vision.sizes=[1,2]", r"config\.model\.vision\.sizes is a list; write a tuple"),
    ],
)
def test_wrong_override(program, override, message):
    with pytest.raises(UserError, match=message):
        read(program, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--config.optimizer.betas=(0.9,)",
            r"betas: expected tuple\[float, float\], found 1 values",
        ),
        ("--config.optimizer.name=adam", r"config\.optimizer\.name: expected one of 'adamw', .*, found 'adam'"),
        ("--config.remat=some", r"config\.remat: expected one of 'none', 'dots', 'full', found 'some'"),
        ("--config.train.steps=0", r"config\.train: steps: expected at least 1, found 0"),
        ("--config.sharding.mesh.fsdp=0", r"config\.sharding\.mesh: fsdp: expected"),
    ],
)
def test_wrong_value_is_named_when_built(program, override, message):
    with pytest.raises(UserError, match=message):
        configs.build(schema.Config, read(program, override), "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "expected a function get_config"),
        ("def get_config(): return {}", "must return a ConfigDict, found dict"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError"),
        ("def get_config(:", "SyntaxError"),
        ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()", "takes no argument"),
    ],
)
def test_wrong_program(tmp_path, text, message):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    argument = ":tiny" if "takes" in message else ""
    with pytest.raises(UserError, match=message):
        configs.parse_config_flag(f"{path}{argument}")


def test_wrong_files(tmp_path, program):
    with pytest.raises(UserError, match="no such file"):
        configs.load(str(tmp_path / "missing.py"))
    with pytest.raises(UserError, match=r"expected a \.py or \.json file"):
        configs.load(str(tmp_path))
    with pytest.raises(UserError, match="KeyError: 'huge'"):
        configs.load(f"{program}:huge")
    for text in ("{", "[1]", '{"a": NaN}', "[" * 100_000):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(UserError, match=r"wrong\.json"):
            configs.load(str(tmp_path / "wrong.json"))
    (tmp_path / "wrong.json").write_text('{"family": "toy", "train": {"steps": 1, "seed": 0, "steps": 2}}')
    with pytest.raises(UserError, match="not a JSON configuration: 'steps' appears twice$"):
        configs.load(str(tmp_path / "wrong.json"))


def test_json_reads_back_what_was_recorded(tmp_path, program):
    config = read(program, "--config.optimizer.lr=0.5")
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(config))
    again = configs.parse_config_flag(str(path))
    assert again.to_dict() == config.to_dict()
    assert configs.config_hash(again) == configs.config_hash(config)
    assert configs.diff(again, config) == []
    built = configs.build(schema.Config, config, "")
    assert configs.build(schema.Config, configs.parse_config_flag(str(path)), "") == built
    changed = configs.parse_config_flag(str(path), ["--config.optimizer.lr=0.25", "--config.model.extra=1"])
    assert configs.diff(config, changed) == ["model.extra: absent -> 1", "optimizer.lr: 0.5 -> 0.25"]
    assert configs.config_hash(changed) != configs.config_hash(config)


def test_command_line(program):
    def command(*arguments):
        parser = configs.command_line("test")
        parser.add_argument("--workdir")
        return configs.parse_command(parser, arguments)

    options, config = command("--workdir=w", f"--config={program}:tiny", "--config.train.seed", "-3")
    assert options.workdir == "w" and config is not None and config.train.seed == -3
    assert command()[1] is None
    for arguments, message in [
        (("--work=1",), r"unknown argument --work=1; did you mean '--workdir'\?"),
        (("stray",), "unknown argument stray"),
        (("--config.a=1",), "needs --config=FILE"),
        (("--workdir",), "expected one argument"),
    ]:
        with pytest.raises(UserError, match=message):
            command(*arguments)


def test_shared_values_do_not_leak_between_configs(program):
    read(program, "--config.optimizer.betas=(0.1, 0.2)", "--config.data.sources[0].path=/changed")
    config = read(program)
    assert config.optimizer.betas == (0.9, 0.999) and config.data.sources[0]["path"] == "a"
    assert isinstance(config, ConfigDict) and config.is_locked


def test_configurations_are_read_without_jax():
    code = "import sys, vlm.config; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_streams_and_the_streams_of_sources_must_agree(program):
    config = read(program, "--config.data.streams={'pairs': 1.0}")
    with pytest.raises(UserError, match=r"^config\.data: streams: source 0 names no stream; choose from pairs$"):
        configs.build(schema.Config, config, "")
    config.data.sources[0]["stream"] = "pairs"
    assert configs.build(schema.Config, config, "").data.members == ["pairs"]
    assert configs.build(schema.Config, read(program), "").data.members == []
