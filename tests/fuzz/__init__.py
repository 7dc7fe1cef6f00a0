"""Every reader of what others write, fed by a fuzzer that follows the code's branches."""
