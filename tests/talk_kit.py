"""Conversations in the format of corpora."""


def messages(*pairs):
    """Chat messages from pairs (role, text)."""
    return [{"role": role, "content": content} for role, content in pairs]
