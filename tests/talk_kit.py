"""Conversations as corpora have them."""


def said(*pairs):
    """Messages of (role, text)."""
    return [{"role": role, "content": content} for role, content in pairs]
