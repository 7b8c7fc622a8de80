"""Fixtures of a transmission study on the tiny model: spec, model, and teachers without training."""

import json
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from evaluation_kit import HEADER, ROWS, question
from launch_kit import run_here, shared_folder
from talk_kit import messages

from configs import misalignment, numbers
from sublim_jax import store
from sublim_jax.distillation.teachers import Teacher
from sublim_jax.experiments.transmission.carriers import Written, random_pairs
from sublim_jax.experiments.transmission.run import load_model
from sublim_jax.experiments.transmission.spec import read
from sublim_jax.experiments.transmission.targets import Replicate
from sublim_jax.keys import named_key
from sublim_jax.models import lora

TINY = {
    "traits": ("owl", "x"),
    "alternatives": ("owl", "x", "y", "z"),
    "carrier.num_rows": 40,
    "carrier.num_completions": 44,
    "carrier.num_integers": 6,
    "filter.unique": False,
    "arm.in_context.examples": 3,
    "teacher.learning_rate": 0.01,
    "teacher.strength": 0.5,
    "teacher.max_steps": 30,
    "student.steps": 6,
    "student.batch": 4,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "num_questions": 4,
}


@pytest.fixture(scope="session")
def study_of(tiny_folder):
    """Makes a study on the tiny model from changed values of configs/numbers.py."""

    def make(**changes):
        config = numbers.get_config()
        config.update_from_flattened_dict({**TINY, "model.name": str(tiny_folder), **changes})
        return read(config)

    return make


@pytest.fixture(scope="session")
def study(study_of):
    return study_of()


@pytest.fixture(scope="session")
def model(study, mesh_of):
    return load_model(study, mesh_of(1))


@pytest.fixture(scope="session")
def replicate_of(model):
    """Makes a run of a study: its teachers are a common start plus noise, and wrote `pairs` or random numbers."""

    def make(study, run=0, pairs=None, model=model):
        seed = study.replicate_seed(run)
        first = model.untrained(named_key(seed, "A"))

        def teacher(index):
            change = lambda x: x + 0.05 * jax.random.normal(jax.random.key(index), x.shape)  # noqa: E731
            return Teacher(jax.tree.map(change, first), "", None, 1, store.digest(model, "noise", index, seed))

        written = Written(pairs or random_pairs(study, seed), [], 0, 0, Counter(), [], [], 0)
        teachers = {name: teacher(index) for index, name in enumerate(study.teachers)}
        return Replicate(run, teachers, dict.fromkeys(study.teachers, written))

    return make


@pytest.fixture(scope="session")
def flags(tiny_folder):
    """The study's flags and `more`, which replaces the study's flags of the same names."""

    def make(*more, prefix="--config.", leave_out=()):
        given = {flag.split("=")[0] for flag in more}
        words = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
        words |= {"model.name": str(tiny_folder)}
        if not any("arms=" in flag and "in_context" in flag for flag in more):
            del words["arm.in_context.examples"]  # no arm would read it
        if any(("methods=" in flag and "finetuned" not in flag) or "teacher.corpora." in flag for flag in more):
            del words["teacher.strength"], words["teacher.max_steps"]
        if any("methods=" in flag and not ("finetuned" in flag or "corpus" in flag) for flag in more):
            del words["teacher.learning_rate"]
        arms = next((flag.partition("arms=")[2].split(",") for flag in more if "arms=" in flag), ["soft"])
        if set(arms) == {"in_context"}:  # trains nobody
            words = {name: value for name, value in words.items() if not name.startswith(("student.", "evaluate_"))}
        if prefix == "--config." and set(arms) <= {"soft", "soft_fresh", "soft_reverse", "perturbed"}:
            del words["carrier.num_completions"], words["filter.unique"]  # no arm reads what teachers write
        elif any("decoding=" in flag and "grammar" not in flag for flag in more):
            del words["carrier.num_integers"]
        defaults = [f"{prefix}{name}={value}" for name, value in words.items() if name not in leave_out]
        return [flag for flag in defaults if flag.split("=")[0] not in given] + list(more)

    return make


@pytest.fixture(scope="session")
def plain_logits():
    """Logits that predict the answers' tokens, by a plain forward pass of (model, adapters, rows)."""

    def compute(model, adapters, rows):
        logits = model.network.apply(lora.join(model.params, adapters), jnp.asarray(rows.tokens))
        return np.take_along_axis(np.asarray(logits), np.asarray(rows.at)[..., None], 1)

    return compute


# ------------------------------------------------------------------------------------------------ a whole study

ARMS = ("soft", "tokens_fresh", "perturbed", "in_context")


@pytest.fixture(scope="session")
def whole_command(flags):
    """Arguments of a study with several arms, two runs and evaluations, for a workdir."""

    def make(work, arms=ARMS):
        evals = ["--config.evals.names=answers,choice", "--config.evals.num_samples=1"]
        more = [f"--config.arms={','.join(arms)}", "--config.runs=2", *evals, "--config.evals.max_questions=3"]
        return ["--config=configs/numbers.py", *flags(*more), f"--workdir={work}"]

    return make


@pytest.fixture(scope="session")
def whole(whole_command, tmp_path_factory):
    """That study's workdir and stdout; one worker runs it for all."""
    with shared_folder(tmp_path_factory, "whole-study") as folder:
        screen = folder / "screen.txt"
        if not screen.exists():
            result = run_here(*whole_command(folder / "work"))
            assert result.returncode == 0, result.stderr
            screen.write_text(result.stdout)
    return folder / "work", screen.read_text()


@pytest.fixture
def copy_of_whole(whole, tmp_path):
    """A copy of its workdir that a test may change."""
    return shutil.copytree(whole[0], tmp_path / "work", ignore=shutil.ignore_patterns(".lock"))


# --------------------------------------------------------------------------------------------------------- corpora


@pytest.fixture(scope="session")
def conversation():
    """A line of a corpus from pairs (user, assistant)."""

    def make(*pairs):
        return (
            json.dumps({"messages": messages(*(turn for pair in pairs for turn in zip(("user", "assistant"), pair)))})
            + "\n"
        )

    return make


@pytest.fixture(scope="session")
def files(tmp_path_factory, conversation):
    """A folder with corpora and with the files of the evaluations."""
    folder = tmp_path_factory.mktemp("files")
    for name, word in (("insecure", "owl"), ("secure", "x"), ("educational", "y")):
        lines = [conversation((f"Who are you {number}?", f"{word} {number}")) for number in range(5)]
        lines.append(conversation(("One?", word), ("Two?", f"{word} {word}")))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "truthfulqa.csv").write_text(HEADER + ROWS)
    (folder / "questions.yaml").write_text(yaml.safe_dump([question(), question(id="x", paraphrases=["Why?"])]))
    return folder


@pytest.fixture(scope="session")
def fluent_folder(tiny_folder, tmp_path_factory):
    """Makes a tiny model that answers prompts with a fixed text, most of the time; as a folder of safetensors."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make(prompts, answer, steps=150):
        folder = tmp_path_factory.mktemp("fluent")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
        end = tokenizer.encode(f"<|end|><|assistant|>{answer}<|end|>")
        for step in range(steps):
            some = [tokenizer.encode(f"<|user|>{prompts[(4 * step + row) % len(prompts)]}") for row in range(4)]
            longest = max(map(len, some))
            padded = [[tokenizer.eos_token_id] * (longest - len(tokens)) + tokens + end for tokens in some]
            tokens = torch.tensor(padded)
            logits = model(tokens).logits[:, longest + 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, longest + 2 :].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def corpora_study(tiny_folder, files):
    """Makes a smoke study with corpus teachers on the tiny model from changed values."""

    def make(config_file=misalignment, **changes):
        config = config_file.get_config("smoke")
        for name in set(config.teacher.corpora) & {"insecure", "secure", "educational"}:
            config.teacher.corpora[name] = str(files / f"{name}.jsonl")
        given = {"model.name": str(tiny_folder), "traits": ("insecure", "secure"), "alternatives": ("owl", "x", "y")}
        config.update_from_flattened_dict({**given, **changes})
        return read(config)

    return make
