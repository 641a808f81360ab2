"""From logits to tokens: processors, rules and grammars on them, sampling, and the scores that are shown."""
