"""Moving scripts from PEFT to tunerkit: where each of PEFT's names is, and the rewriting of what imports them."""
