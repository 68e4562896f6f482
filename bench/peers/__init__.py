"""Peers, one file each: base.py says what a peer is. A new file here is a new peer; nothing else needs a change."""
