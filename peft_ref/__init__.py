"""peft_ref."""
