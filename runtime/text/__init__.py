"""Words to tokens: the tokenizer and each family's prompt."""
