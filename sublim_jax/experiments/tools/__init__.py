"""What is done with a language model beside the studies."""
