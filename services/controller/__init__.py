"""The controller: decides. A pure core in a thin shell; no torch, no GPU, no decoding of payloads."""
