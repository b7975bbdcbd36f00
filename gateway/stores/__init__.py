"""Durable state. One file per store."""
