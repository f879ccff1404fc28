"""`tandem plan`: estimates how long steps take with other numbers of devices, and recommends how to divide them."""
