"""The sources of a generator's drafts: texts, earlier answers, draft models; and a drafter for each answer."""
