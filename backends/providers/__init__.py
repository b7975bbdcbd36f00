"""One file per provider, each a `PROVIDER` record: how it is reached and what it speaks."""
