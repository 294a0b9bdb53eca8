"""The backends that come with peft_ref, one array library a file. Nothing is imported until one is asked for."""
