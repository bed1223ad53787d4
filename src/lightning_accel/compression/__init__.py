"""Values as codes: the codecs, plans of messages, and what codes have lost."""
