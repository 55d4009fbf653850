"""The doors: decode, call one manager, encode. No rule lives here."""
