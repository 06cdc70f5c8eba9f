"""Who a site is: its key and its signatures."""
