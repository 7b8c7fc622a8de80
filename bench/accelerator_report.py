"""The measurements of `bench/accelerator.sh`, as a table and as a page of the docs. Needs only the standard library.

`python -m bench.accelerator_report OUT` writes OUT/summary.md and prints it.
"""

import json
import sys
from pathlib import Path
from typing import Any

PARTS = ("gpu_tests", "mnist", "mnist_torch", "small", "large", "generate")
TITLES = {
    "mnist": "MNIST noise distillation",
    "mnist_torch": "The same in batched PyTorch",
    "small": "Qwen2.5-1.5B's shape, bfloat16, random weights",
    "large": "Qwen2.5-7B's shape, bfloat16, random weights",
    "generate": "`generate`, Qwen2.5-1.5B's shape, bfloat16",
}


def read(out: Path) -> dict[str, dict[str, Any]]:
    """The results of each part that has written a file, by name."""
    return {part: json.loads((out / f"{part}.json").read_text()) for part in PARTS if (out / f"{part}.json").exists()}


def outcomes(out: Path) -> dict[str, tuple[str, str]]:
    """How each part ended, and its seconds, as the script noted them."""
    file = out / "status.tsv"
    lines = file.read_text().splitlines() if file.exists() else []
    return {part: (outcome, seconds) for part, seconds, outcome in (line.split("\t", 2) for line in lines)}


def table(rows: list[list[str]]) -> list[str]:
    head, *rest = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest)]


def row_of(row: dict[str, Any]) -> list[str]:
    """A row of the table: what was measured, its time, rate and share; or why it failed."""
    if "failed" in row:
        return [row["what"], "not measured", row["failed"].replace("|", "/"), ""]
    seconds = f"{row['seconds']:.2f} s" if row["seconds"] >= 1 else f"{row['seconds'] * 1e3:.2f} ms"
    rate = f"{row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
    share = f"{row['share']:.1%} of {row['of']}" if row.get("share") else ""
    return [row["what"], seconds, rate, share]


def seconds_of(parts: dict[str, dict[str, Any]], part: str, what: str) -> float | None:
    """The time of the last row of a part whose text has `what`."""
    rows = [row for row in parts.get(part, {}).get("rows", []) if what in row["what"] and "seconds" in row]
    return rows[-1]["seconds"] if rows else None


def ratios(parts: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each pair of measurements that are both there."""
    pairs = [
        ("MNIST: PyTorch / ours, first time", ("mnist_torch", "MNIST"), ("mnist", "first time")),
        ("MNIST: PyTorch / ours, programs compiled before", ("mnist_torch", "MNIST"), ("mnist", "again")),
        ("generate: transformers / ours", ("generate", "transformers"), ("generate", "our")),
        ("1.5B: 8 students in one program / in turn", ("small", "one program"), ("small", "in turn")),
        ("7B: 8 students in one program / in turn", ("large", "one program"), ("large", "in turn")),
    ]
    lines = []
    for label, numerator, denominator in pairs:
        above, below = seconds_of(parts, *numerator), seconds_of(parts, *denominator)
        if above and below:
            lines.append(f"- {label}: **{above / below:.2f}**")
    return lines


def summary(out: Path) -> str:
    """How every part ended, and all of its rows."""
    parts, ended = read(out), outcomes(out)
    rows = [["part", "ended", "seconds", "rows"]]
    for part in PARTS:
        outcome, seconds = ended.get(part, ("not run", ""))
        rows.append([part, outcome.replace("|", "/"), seconds, str(len(parts[part]["rows"])) if part in parts else ""])
    lines = table(rows)
    for part, record in parts.items():
        lines += ["", f"{part}: {record.get('device', '')}, {versions(record)}"]
        lines += table([["what", "time", "rate", "share"], *map(row_of, record["rows"])])
    return "\n".join([*lines, "", *ratios(parts)]) + "\n"


def versions(record: dict[str, Any]) -> str:
    kept = {name: record.get("versions", {}).get(name) for name in ("python", "jax", "torch", "transformers")}
    return ", ".join(f"{name} {value}" for name, value in kept.items() if value)


def write(out: Path) -> None:
    """docs/bench-accelerator.md."""
    parts = read(out)
    if not parts:
        raise SystemExit(f"{out} has no part's JSON; run bench/accelerator.sh {out} first")
    if any(record.get("tiny") for record in parts.values()):
        raise SystemExit(f"{out} was measured with --tiny, which shows that the parts run and not how fast")
    lines = [
        "# Measured on one accelerator",
        "",
        "`bash bench/accelerator.sh OUT` on the machine, then `python -m bench.accelerator --write=OUT`. A share is of "
        "the card's peak by its data sheet: model FLOPs (2 N a token forward, 4 N backward, 2 N where the base is "
        "frozen) over time, or the bytes that a decoding step must read (weights once, the whole cache) over time.",
    ]
    for part, record in parts.items():
        lines += [
            "",
            f"## {TITLES[part]}",
            "",
            f"Measured {record['date']}: {record.get('device')}; {versions(record)}.",
        ]
        lines += ["", *table([["what", "time", "rate", "share"], *map(row_of, record["rows"])])]
        for row in record["rows"][-1:]:
            arms = row.get("arms", {})
            values = [f"{name} {value if isinstance(value, float) else value[0]:.3f}" for name, value in arms.items()]
            if values:
                lines += ["", f"Test accuracy: {', '.join(values)}."]
    if both := ratios(parts):
        lines += ["", "## Ratios", "", *both]
    file = Path(__file__).parents[1] / "docs" / "bench-accelerator.md"
    file.write_text("\n".join(lines) + "\n")
    print(f"{file} written")


if __name__ == "__main__":
    text = summary(Path(sys.argv[1]))
    (Path(sys.argv[1]) / "summary.md").write_text(text)
    print(text)
