"""Process groups and what goes over them: messages, the memory they need, who sits on which node."""
