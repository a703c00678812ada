"""What a running command shows on the screen and writes into its log; `summary` and `tables` have what it says."""
