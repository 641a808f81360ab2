"""What a step does: how much to draft, which model checks it, when to confirm, and what the verifier sees and knows."""
