"""What boots guests; and the smoke tests in them, on the stock kernel and, by `make test-vm`, on all."""
