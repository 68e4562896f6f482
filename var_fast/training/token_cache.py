class CacheBatches: ...


class TokenCache: ...


def is_token_cache(p):
    return False
