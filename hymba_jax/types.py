"""The shape legend: every axis name that appears in a jaxtyping annotation.

| name       | in the paper      | meaning                                                  |
|------------|-------------------|----------------------------------------------------------|
| batch      | B                 | sequences                                                |
| length     | L or S            | positions of whatever the function is given              |
| queries    |                   | query positions                                          |
| keys       |                   | key positions                                            |
| hidden     | H                 | width of the residual stream                             |
| heads      | Nq                | query heads                                              |
| kv_heads   | Nk                | key/value heads                                          |
| head_dim   | Dk                | width of a query or key head                             |
| value_dim  | Dv                | width of a value head                                    |
| channels   | E                 | SSM channels                                             |
| state      | N                 | SSM state size per channel                               |
| ssm_heads  |                   | heads of Mamba2, each with a time step and decay         |
| ssm_head_dim | P               | channels of a Mamba2 head                                |
| ssm_groups | G                 | groups of Mamba2 heads that share B and C                |
| dt_rank    | R                 | width of the time step before `dt_proj`                  |
| chunks     |                   | chunks of a sequence                                     |
| steps      |                   | positions in a chunk                                     |
| kernel     | K                 | taps of the causal convolution                           |
| slots      |                   | positions that a cache of keys and values holds          |
| meta_tokens | M                | learned tokens before every sequence                     |
| vocab      |                   | tokens in the vocabulary                                 |
| stream     |                   | tokens of many documents, one after the other            |

Tests import the packages that compute under jaxtyping's import hook, so that their annotations are
checked at run time; ordinary use pays nothing.
"""

from jaxtyping import Array, Bool, Float, Int, Key, UInt

__all__ = ["Array", "Bool", "Float", "Int", "Key", "UInt"]
