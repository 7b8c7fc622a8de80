"""Every value of `--config.…=` is accepted, or refused in one line that names it, before anything is computed.

Everything runs in one process, up to the loading of a model or data.
"""

import re
from pathlib import Path

import jax
import pytest

import launch
from sublim_jax import assets, overrides, signals, weights, workdir
from sublim_jax.data import chat, records
from sublim_jax.errors import UserError
from sublim_jax.experiments import EXPERIMENTS
from sublim_jax.experiments.tools import evaluate, sample
from sublim_jax.store import Store
from sublim_jax.workdir import claim


class Accepted(Exception):
    """The command was accepted and would now load a model or data."""


def accept(*args, **options):
    raise Accepted


@pytest.fixture
def typed(monkeypatch, capsys, tmp_path):
    """Runs a command; returns the line that refuses it, or "" if it is accepted."""
    monkeypatch.setattr(weights, "load", accept)
    monkeypatch.setattr(assets, "fetch", accept)
    return command(monkeypatch, capsys, tmp_path)


def command(monkeypatch, capsys, tmp_path):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(workdir, "check", lambda *_, **__: None)  # do not look for an earlier run
    monkeypatch.setattr(workdir, "_claimed", accept)
    monkeypatch.setattr(signals, "install", lambda: None)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Name a tree.\n")

    def run(*words):
        if words and words[0].startswith("--config=configs/sample.py"):
            words = (words[0], f"--config.prompts={prompts}", *words[1:])
        try:
            code = launch.run(["launch.py", *words])
        except Accepted:
            return ""
        line = capsys.readouterr().err
        assert code == 2 and line.startswith("launch.py: ") and line.count("\n") == 1, (words, code, line)
        assert not re.search(r"Traceback|Error\b|object at 0x|\\n", line), line
        return line

    return run


DISTINCT = (
    *("mnist.py:smoke", "theorem.py:smoke", "theorem.py:trajectory", "theorem.py:forecast", "theorem.py:examples"),
    *("numbers.py:smoke", "cross_model.py:smoke", "evaluate.py", "sample.py", "paper.py:smoke"),
)
LIKE_OTHERS = ("mnist.py:sweep", "code.py:smoke", "cot.py:smoke", "misalignment.py:smoke")  # the same values as others
CONFIGS = (*DISTINCT, *(pytest.param(config, marks=pytest.mark.slow) for config in LIKE_OTHERS))
HUGE = "1" + "0" * 30
NO_NUMBER = ("word", "None", "", "nan", "inf", "-inf", "1e300", HUGE)
NO_LIST = ("owl,,lion", ",", "(owl", "('owl', None)")
TEXTS = ("-1", "0", "10", HUGE, "", "None", "word", "5.5", "word,", "word, other", "x" * 5000, "~nobody-here/x")
# 0 means "none" or "all" here, or is an ordinary value.
ZERO = re.compile(
    r"seed|rank|clip|warmup|noise|constraint\.m|max_questions|per_minute|layer|scale|log_ratio|threshold|min_mass"
    r"|init_distance|top_k|min_p|tensor|sampling\.slots|lanes|temperature|max_value|distances|spread"
    r"|student\.width|student\.depth|^replica$"
)
NEGATIVE = re.compile(r"mesh\.|steps\.(min|max)|steering_scale")  # negative values are allowed
TWINS = re.compile(r"(^|\.)arm\.(?!soft\.|cross\.)|^plan\.(?!mnist\.)")  # as others of their kind


def keys(config):
    return [key for key in overrides.keys(config) if not TWINS.search(key)]


def value(config, key):
    for name in key.split("."):
        config = config[name]
    return config


def must_be_refused(old, key):
    """Texts that no value of this type accepts."""
    if isinstance(old, bool):
        return ("word", "None", "", "5.5", "-1")
    if isinstance(old, int | float):
        texts = [*NO_NUMBER, "owl, lion", "1,"]
        texts += ["5.5"] if isinstance(old, int) else []
        texts += [] if NEGATIVE.search(key) else ["-1"]
        texts += [] if ZERO.search(key) or key.startswith("steps.") else ["0"]
        return texts
    if isinstance(old, tuple):
        twice = ("owl,owl",) if not old or isinstance(old[0], str) else ("word", "nan", HUGE)
        return (*NO_LIST, *twice)
    return ()


@pytest.mark.parametrize("config", CONFIGS)
def test_what_no_value_can_be_is_refused_by_its_name(config, typed):
    read = overrides.load(f"configs/{config}")
    accepted, unnamed = [], []
    for key in keys(read):
        for text in must_be_refused(value(read, key), key):
            line = typed(f"--config=configs/{config}", f"--config.{key}={text}")
            if not line:
                accepted.append((key, text))
            elif key.split(".")[-1] not in line:
                unnamed.append((key, text, line))
    assert not accepted and not unnamed


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_whatever_is_typed_is_accepted_or_refused_in_one_line(config, typed):
    read = overrides.load(f"configs/{config}")
    for key in keys(read):
        for text in (*TEXTS, *NO_NUMBER, *NO_LIST):
            line = typed(f"--config=configs/{config}", f"--config.{key}={text}")
            assert not line or key.split(".")[-1] in line, (key, text, line)


# ------------------------------------------------------------------------------------------------- values by themselves


def read(*words):
    return launch.read(launch.parse(["launch.py", *words]))[0]


def test_values_typed_by_old_names_are_known_by_their_new_ones():
    """Those are looked up for what nothing reads."""
    _, keys = launch.read(launch.parse(["launch.py", "--config=configs/numbers.py", "--config.arm.soft.share=0.5"]))
    assert keys == ["arm.soft.fraction"]


@pytest.mark.parametrize("config", ["mnist.py", "theorem.py", "numbers.py", "sample.py", "evaluate.py"])
def test_seeds_are_those_that_jax_tells_apart(config, typed):
    assert jax.random.key(2**32) == jax.random.key(0)  # without 64 bits; it takes -1, and overflows from 2**63 on
    for seed in (-1, 2**32, 2**63, 2**64):
        assert "a seed is 0 to 4294967295" in typed(f"--config=configs/{config}", f"--config.seed={seed}")
    for seed in (0, 2**32 - 1):
        assert "seed" not in typed(f"--config=configs/{config}", f"--config.seed={seed}")


@pytest.mark.parametrize(
    "text, expected", [("A", ["A"]), ("A,", ["A"]), ("A, B", ["A", "B"]), (" A ,B, ", ["A", "B"]), ("None", [])]
)
def test_a_list_of_names_is_what_was_meant(text, expected):
    config = read("--config=configs/cross_model.py", f"--config.models={text}")
    assert list(config.models) == expected
    config = read("--config=configs/evaluate.py", f"--config.model.adapters={text}")
    assert list(evaluate.read(config).model.folders) == (expected or [""])  # without adapters, the model itself
    assert list(read("--config=configs/mnist.py", f"--config.arms={text}").arms) == expected


def test_a_name_that_is_there_twice_is_refused(typed, tmp_path):
    folder = str(tmp_path)
    line = typed("--config=configs/evaluate.py", f"--config.model.adapters={folder}, {folder}")
    assert "model.adapters" in line and "appears twice" in line
    assert typed("--config=configs/evaluate.py", f"--config.model.adapters={folder},") == ""
    assert "appears twice" in typed("--config=configs/cross_model.py:soft", "--config.models=A, B,A")
    assert "appears twice" in typed("--config=configs/cross_model.py:soft", "--config.models=A", "--config.models=A,B")


@pytest.mark.parametrize(
    "key, text, expected",
    [
        ("lora.layers", "0, 3,", (0, 3)),
        ("lora.modules", "query, value", ("query", "value")),
        ("evals.judge.prices", "1,1", (1.0, 1.0)),
        ("traits", "('owl', 'lion')", ("owl", "lion")),
        ("traits", "", ()),
        ("lora.alpha", "8", 8.0),
        ("remat", "true", True),
        ("packs.persona", "None", ""),
    ],
)
def test_a_value_is_read_as_the_type_that_it_replaces(key, text, expected):
    parsed = value(read("--config=configs/numbers.py", f"--config.{key}={text}"), key)
    assert parsed == expected and type(parsed) is type(expected)


def test_items_of_an_empty_list_are_what_was_typed():
    config = read("--config=configs/sample.py", "--config.constraint.choices=007, 7", "--config.stop_strings=1,2")
    assert config.constraint.choices == ("007", "7") and sample.read(config).stops == ("1", "2")
    quoted = read("--config=configs/sample.py", r"--config.stop_strings=('\n', ', ')")
    assert sample.read(quoted).stops == ("\n", ", ")


def test_flags_may_be_switches_repeated_or_stand_beside_their_value():
    config = read("--config=configs/numbers.py", "--config.remat", "--config.seed", "7", "--noconfig.filter.unique")
    assert config.remat is True and config.seed == 7 and config.filter.unique is False
    config = read("--config.arms=soft", "--config", "configs/numbers.py", "--config.arms=tokens", "--config.runs=2")
    assert config.arms == ("soft", "tokens") and config.runs == 2
    assert read("--config=configs/numbers.py").runs == 1  # no state of an earlier command is left


def test_a_system_prompt_of_none_is_none(tiny):
    none, empty, owl = (
        sample.tokens_of(
            sample.read(read("--config=configs/sample.py", f"--config.system={text}")), tiny, [{"prompt": "x"}]
        )
        for text in ("None", "", "owl")
    )
    assert none == empty != owl
    prefix, (prompt,) = none
    assert prefix + prompt == chat.prompt(tiny.tokenizer, "x")


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "--config is missing"),
        (["configs/mnist.py"], "'configs/mnist.py' is not a flag; write --config=FILE"),
        (["--config=configs/mnist.py", "more"], "'more' is not a flag"),
        (["--config=configs/mnist.py", "--workdri=x"], "no flag --workdri; did you mean --workdir?"),
        (["--config=configs/mnist.py", "--zzz=x"], "no flag --zzz; there are --config"),
        (["--config=configs/mnist.py", "--update=maybe"], "--update=maybe: true or false is needed"),
        (["--config=configs/mnist.py", "--num_processes=two"], "--num_processes=two: a whole number is needed"),
        (["--config=configs/mnist.py", "--noupdate=true"], "update"),
        (["--config=configs/mnist.py", "--stderrthreshold=foo"], "foo"),
        (["--config=configs/mnist.py", "--flagfile"], "flagfile"),
        (["--config=configs/mnist.py", "--flagfile=docs/figures/mnist-quick-arms.png"], "decode"),
        (["--config=configs/mnist.py", "--config.arms=[{[1]: 2}]"], "leave brackets and quotes out"),
        (["--config=configs/mnist.py", "--config.runz=3"], "there is no config.runz; did you mean config.runs?"),
        (["--config=configs/mnist.py", "--config.rnus=3"], "there is no config.rnus; did you mean config.runs?"),
        (["--config=configs/mnist.py", "--config.studnet.epochs=3"], "did you mean config.student.epochs?"),
        (["--config=configs/mnist.py", "--config.epochs=3"], "did you mean config.clone.epochs?"),
        (["--config=configs/mnist.py", "--config.alternatives=a"], "there are config.arms, config.checkpoint_every"),
        (["--config=configs/mnist.py", "--config.student.lr=1"], "there are config.student.activation"),
        (
            ["--config=configs/numbers.py", "--config.arm.new.objective=kl"],
            "there are config.arm.foreign, config.arm.in_",
        ),
        (["--config=configs/numbers.py", "--config.arm.sotf.noise=1"], "did you mean config.arm.soft.noise?"),
        (["--config=configs/mnist.py", "--config.student=1"], "is a group of values; set one of them: config.student."),
        (["--config=configs/mnist.py", "--config.runs"], "config.runs has no value; write --config.runs="),
        (["--config=configs/mnist.py", "--noconfig.runs"], "config.runs has no value"),
        (["--config=configs/mnist.py", "--noconfig.inputs.fresh=1"], "write --config.inputs.fresh=1"),
        (["--config=configs/mnist.py", "--config.experiment=lab"], "'lab' is none of mnist, alignment"),
        (["--config=configs/mnist.py", "--config.experiment=sample"], "it is 'mnist' by the file"),
        (["--config=configs/mnist.py", "--config.experiment=mnist_check"], "is none of mnist"),
        (["--config=configs/mnist.py", "--config.preset=paper"], "--config=FILE:PRESET"),
        (["--config=configs/theorem.py:forecast", "--config.mnist.preset=paper"], "config.mnist.preset='paper'"),
        (["--config=configs/theorem.py:forecast", "--config.mnist.seed=1"], "set --config.seed instead"),
        (["--config=configs/cross_model.py", "--config.study.arms=soft"], "study.arms=('soft',): it follows from"),
        (["--config=configs/sample.py", "--config.chat=False", "--config.system=x"], "system is for conversations"),
        (["--config=configs/sample.py", "--config.slots=2147483647"], "slots=2147483647: choose 1048576 or less"),
        (["--config=configs/numbers.py", "--config.evals.num_samples=2147483647"], "choose 10000000 or less"),
        (["--config=configs/paper.py", "--config.judge.kind=endpoint"], "judge.model is missing"),
        (["--config=configs/mnist.py", "--config.sweep.points=1,2"], "--config.sweep.axis=KEY"),
        (["--config=configs/mnist.py", "--config.student.epochs=2000000000"], "student.epochs=2000000000 are"),
        (["--config=configs/numbers.py", "--config.lora.rank=0", "--config.lora.layers=1"], "lora.rank=0 trains all"),
        (["--config=configs/numbers.py", "--config.traits=../owl,lion"], "'../owl' cannot name a file"),
        (["--config=configs/numbers.py", "--config.model.name=\udcff"], "not UTF-8 text"),
        (["--config=configs/numbers.py", "--config.model.name=a\0b"], "character 0"),
        (["--config=configs/numbers.py", "--preflight="], "--preflight="),
        (["--config=configs/numbers.py", "--preflight=v9:2x2"], "--preflight=v9:2x2"),
        (["--config=configs/mnist.py", "--preflight=h100:0"], "--preflight=h100:0"),
        (["--config=configs/theorem.py", "--preflight=local"], "has no step on a mesh"),
        (["--config=configs/mnist.py", "--coordinator=here:1"], "needs --num_processes and --process_id"),
    ],
)
def test_a_command_that_makes_no_sense_is_told_so(words, expected, typed):
    assert expected in typed(*words)


def test_a_coordinator_of_no_sense_is_refused_before_it_is_waited_for(typed):
    config = ("--config=configs/mnist.py", "--num_processes=2")
    assert "--process_id=2 must be from 0 to 1" in typed(*config, "--coordinator=here:1", "--process_id=2")
    assert "host:port is needed" in typed(*config, "--coordinator=here", "--process_id=0")


@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py")))
def test_an_unknown_preset_names_those_that_there_are(name, typed):
    line = typed(f"--config=configs/{name}.py:nope")
    assert line.startswith(f"launch.py: configs/{name}.py has no preset 'nope'; it has ")
    presets = line.strip().split("; it has ")[1].split(", ")
    for preset in presets:
        assert read(f"--config=configs/{name}.py:{preset}").experiment in EXPERIMENTS


FILES = {
    "def get_config(:": "it is not a Python file",
    "x = 1": "it has no get_config()",
    "def get_config(): return None": "gives no ConfigDict",
    "def get_config(): return {'experiment': 'mnist'}": "gives no ConfigDict",
    "def get_config():\n  return undefined": "line 2: NameError: name 'undefined' is not defined",
    "import nowhere": "line 1: ModuleNotFoundError",
    "raise SystemExit(3)": "line 1: SystemExit",
    "def get_config(a): raise ValueError('no size')": "needs a preset",
    "def get_config(): raise ValueError('no size')": "no size",
    "import ml_collections\ndef get_config(): return ml_collections.ConfigDict()": "experiment=None is none of mnist",
}


OURS = "from configs import mnist\ndef get_config():\n  config = mnist.get_config('smoke')\n  "
FILES |= {
    OURS + "del config.student\n  return config": "config has no value student, which the experiment needs",
    OURS + "del config['runs']\n  return config": "config has no value runs, which the experiment needs",
    OURS + "config.student.epochs = 'many'\n  return config": "TypeError",
    OURS + "del config.runs\n  config.runs = 'many'\n  return config": "config.runs='many' is of type str, not int",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_is_no_config_is_named(text, tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert launch.run(["launch.py", f"--config={file}"]) == 2
    line = capsys.readouterr().err
    assert FILES[text] in line and line.count("\n") == 1 and ("mine.py" in line or "config" in line)


def test_a_config_that_is_missing_a_folder_or_without_presets_is_named(typed, tmp_path):
    assert "there is no such file; did you mean configs/mnist.py?" in typed("--config=configs/minst.py")
    assert "did you mean configs/numbers.py?" in typed("--config=numbers")
    assert "--config=FILE:PRESET" in typed("--config=configs/mnist.py", "--preset=smoke")
    assert "it is not a file" in typed("--config=configs")
    (tmp_path / "mine.py").write_text("def get_config(): return 1")
    assert "has no presets" in typed(f"--config={tmp_path / 'mine.py'}:quick")


# ----------------------------------------------------------------------------------------- what only the model can tell


@pytest.mark.parametrize(
    "config, flags, expected",
    [
        ("numbers", ["lora.layers=0,4"], "lora.layers: 4 must be from 0 to 3"),
        ("numbers", ["lora.layers=0,3"], ""),
        ("numbers", ["teacher.methods=steered", "teacher.steering_layer=4"], "layers are 0 to 3"),
        ("numbers", ["alternatives=zebra"], ""),
        ("sample", ["max_new_tokens=100000"], "context is 512"),
        ("sample", ["top_k=2000000000"], ""),
        ("sample", ["constraint.kind=numbers", "constraint.max_integers=100000000"], "constraint: numbers of up to"),
        ("sample", ["constraint.kind=choice", "constraint.choices=None"], "choice: name one string or more"),
        ("sample", ["constraint.kind=choice", "constraint.choices=007, 7,"], ""),
        ("sample", ["system=None"], ""),
        ("evaluate", ["words=owl"], "words"),
        ("evaluate", ["words=owl, x,", "evals.max_questions=1"], ""),
    ],
)
def test_what_the_model_has_not_is_told_before_any_compute(
    config, flags, expected, tiny_folder, monkeypatch, capsys, tmp_path
):
    typed = command(monkeypatch, capsys, tmp_path)
    traits = ["traits=owl,x", "alternatives=owl,x,y"] if config == "numbers" else []
    given = [f"--config.{flag}" for flag in (f"model.name={tiny_folder}", *traits, *flags)]
    line = typed(f"--config=configs/{config}.py", *given)
    assert (expected in line) if expected else line == ""


@pytest.mark.parametrize("name", ["", "None", "nowhere", "A,", "x" * 5000, "~nobody-here/model", "5", "inf"])
def test_a_model_of_no_such_name_is_told_in_one_line(name, monkeypatch, capsys, tmp_path):
    typed = command(monkeypatch, capsys, tmp_path)
    line = typed("--config=configs/sample.py", f"--config.model.name={name}")
    assert "model" in line and len(line) < 6000


# -------------------------------------------------------------------------------------------------------- damaged files


def test_a_workdir_that_is_no_folder_or_holds_something_else_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    values = sample.read(read("--config=configs/sample.py")).values
    for path, expected in ((file, "is a file"), (file / "below", "cannot write"), ("/proc/nothing", "cannot write")):
        with pytest.raises(UserError, match=expected):
            claim(path, values)
    for text in (b"{", b"\xff\xfe", b"[]", b"null", b"3"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(UserError, match=r"config\.json .*choose another --workdir"):
            claim(tmp_path, values)


def test_a_folder_in_the_place_of_an_artefact_is_named(tmp_path, capsys, monkeypatch):
    store = Store(tmp_path)
    where = store.path("value", 0)
    where.with_name(where.name + ".json").mkdir(parents=True)
    monkeypatch.setattr(launch, "main", lambda *_: store.json("value", lambda _: 1, 0))
    assert launch.run(["launch.py"]) == 2
    assert f"{where.name}.json: Is a directory" in capsys.readouterr().err


def test_what_a_machine_has_too_little_of_is_told_in_one_line(capsys, monkeypatch):
    errors: dict[str, list[Exception]] = {
        "memory": [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")],
        "no space left": [
            OSError(28, "No space left on device"),
            ValueError("ABORTED: No space left on device"),
            OSError(122, "Disk quota exceeded"),
            RuntimeError("RESOURCE_EXHAUSTED: Disk quota exceeded"),
        ],
        "a file cannot be read or written: Input/output error": [OSError(5, "Input/output error")],
        "there is no such user": [RuntimeError("Could not determine home directory.")],
    }
    for expected, raised in errors.items():
        for error in raised:
            monkeypatch.setattr(launch, "main", lambda *_, error=error: (_ for _ in ()).throw(error))
            assert launch.run(["launch.py"]) == 2
            assert expected in capsys.readouterr().err
    monkeypatch.setattr(launch, "main", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert launch.run(["launch.py"]) == 130 and capsys.readouterr().err == "launch.py: stopped by SIGINT\n"
    monkeypatch.setattr(launch, "main", lambda *_: [][0])
    with pytest.raises(IndexError):  # a bug stays a traceback
        launch.run(["launch.py"])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(64) + b"PAR1", b'{"prompt": "x"}'])
def test_a_damaged_parquet_file_is_named(content, typed, tmp_path):
    file = tmp_path / "mine.parquet"
    file.write_bytes(content)
    assert "mine.parquet" in typed("--config=configs/sample.py", f"--config.prompts={file}")


def test_lines_of_an_earlier_run_that_are_no_records_are_passed_over(tmp_path):
    from etils import epath

    file = tmp_path / "samples.jsonl"
    file.write_bytes(b'{"index": 0}\n5\nnull\n\xff\xfe\n[1]\n{"index": 1}\n{"ind')
    assert [record["index"] for record in records.repair(epath.Path(file))] == [0, 1]
