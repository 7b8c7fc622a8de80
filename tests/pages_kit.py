"""Pages of docs that tests write on request."""


def write_section(file, heading, lines):
    """Puts `lines` under a heading of a page of docs, in place of what stood there up to the next heading."""
    text = file.read_text() if file.exists() else ""
    before, known, after = text.partition(f"{heading}\n")
    _, mark, after = after.partition("\n## ")
    gap = "\n" if text and not known else ""
    file.write_text("".join([before, gap, f"{heading}\n\n", "\n".join(lines), "\n", mark, after]))
