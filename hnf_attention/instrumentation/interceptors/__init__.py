"""Interceptors: each replaces the attention functions of one library, and hands their calls to an observer."""
