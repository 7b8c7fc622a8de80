"""Documentation pages that tests write on request."""


def write_section(file, heading, lines):
    """Replaces the section under `heading` of a documentation page by `lines`."""
    text = file.read_text() if file.exists() else ""
    before, known, after = text.partition(f"{heading}\n")
    _, mark, after = after.partition("\n## ")
    gap = "\n" if text and not known else ""
    file.write_text("".join([before, gap, f"{heading}\n\n", "\n".join(lines), "\n", mark, after]))
