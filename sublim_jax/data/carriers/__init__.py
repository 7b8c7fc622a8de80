"""Carriers: tasks whose answers transmit a trait without mentioning it."""
