"""What is read out of a compiled program's text."""

from jaxinfer.plan.collectives import Collectives, collectives

TEXT = """
  %all-reduce.1 = bf16[64,4096]{1,0:T(8,128)(2,1)S(1)} all-reduce(%fusion.3), channel_id=1, replica_groups={{0,1}}
  %all-reduce.2 = (bf16[64,16]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)}) all-reduce(%a, %b), channel_id=2
  %all-reduce-start.3 = f32[2,3]{1,0} all-reduce-start(%c), channel_id=3
  %all-reduce-done.3 = f32[2,3]{1,0} all-reduce-done(%all-reduce-start.3)
  %ag = (bf16[16,8]{1,0}, bf16[128,8]{1,0:T(8,128)}) all-gather-start(%d), dimensions={0}
  ROOT %rs = s8[7]{0} reduce-scatter(%e), dimensions={0}
  %cp = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%f), source_target_pairs={{0,1}}
  %p = pred[3]{0} all-to-all(%g)
  %stage.1 = bf16[16]{0} all-gather(%h), channel_id=1, frontend_attributes={chain_id="0"}
  %stage.2 = bf16[16]{0:S(1)} all-gather(%i), channel_id=1, frontend_attributes={chain_id="0"}
  %stage.3 = bf16[16]{0} all-gather(%j), channel_id=1, frontend_attributes={chain_id="1"}
  %fusion.9 = bf16[64,4096]{1,0} fusion(%all-reduce.1), kind=kLoop, calls=%fused_all-reduce
"""


def test_counts_and_bytes_by_kind():
    assert collectives(TEXT) == {
        "all-reduce": Collectives(3, 64 * 4096 * 2 + 64 * 16 * 2 + 8 * 4 + 6 * 4),
        "all-gather": Collectives(3, 128 * 8 * 2 + 2 * 16 * 2),
        "reduce-scatter": Collectives(1, 7),
        "all-to-all": Collectives(1, 3),
        "collective-permute": Collectives(1, 5 * 4),
    }
    assert collectives("%x = f32[2]{0} add(%a, %b)") == {}
