"""Double binary factorisation: `quantizer` is the contract's side, `start` finds signs, `descent` improves them."""
