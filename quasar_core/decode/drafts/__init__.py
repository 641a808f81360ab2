"""What a generator drafts from: a drafter for each answer, texts, earlier answers, models that guess."""
