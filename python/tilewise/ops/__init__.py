"""One op a file: the public function, its checks, its gradient, its reference, its declaration."""
