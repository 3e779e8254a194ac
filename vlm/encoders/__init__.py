"""Encoders: one shared vision transformer and the text encoders, each configured by one frozen dataclass."""
