; One token of each row attends over a cache that holds it: scores, running softmax (arXiv 1805.02867) and weighted sum
; in one pass over the slots, 16 at a time. Nothing but a row's own slots is read.
;
;   operands  q float32 [B, G, M, H], k float32 [B, G, S, H], v float32 [B, G, S, Hv], slots int32 [B, 2] (the first that
;             counts, the end), start float32 [2, G, M] (the highest score so far, the total of the weights)
;   result    float32 [B, G, M, Hv]
;
; H and Hv are multiples of 16. A unit of work is a row's key head.

; e^x of x <= 0, to 2 units in the last place (Cephes' expf); below -87.3 it is 0.
define private <16 x float> @exp(<16 x float> %x) alwaysinline {
  %low = fcmp olt <16 x float> %x, splat (float 0xC055D33340000000)
  %in = select <16 x i1> %low, <16 x float> zeroinitializer, <16 x float> %x
  ; Added to 1.5 * 2^23, a number is rounded to an integer, which its low bits are.
  %moved = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %in, <16 x float> splat (float 0x3FF7154760000000), <16 x float> splat (float 0x4168000000000000))
  %n = fsub <16 x float> %moved, splat (float 0x4168000000000000)
  %r_high = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %n, <16 x float> splat (float 0xBFE6300000000000), <16 x float> %in)
  %r = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %n, <16 x float> splat (float 0x3F2BD01060000000), <16 x float> %r_high)
  %p1 = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %r, <16 x float> splat (float 0x3F2A0D2CE0000000), <16 x float> splat (float 0x3F56E879C0000000))
  %p2 = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %r, <16 x float> %p1, <16 x float> splat (float 0x3F81112100000000))
  %p3 = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %r, <16 x float> %p2, <16 x float> splat (float 0x3FA5553820000000))
  %p4 = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %r, <16 x float> %p3, <16 x float> splat (float 0x3FC5555540000000))
  %p5 = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %r, <16 x float> %p4, <16 x float> splat (float 0x3FE0000000000000))
  %p6 = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %r, <16 x float> %p5, <16 x float> splat (float 1.0))
  %p7 = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %r, <16 x float> %p6, <16 x float> splat (float 1.0))
  %bits = bitcast <16 x float> %moved to <16 x i32>
  %biased = add <16 x i32> %bits, splat (i32 127)
  %exponent = shl <16 x i32> %biased, splat (i32 23)
  %power = bitcast <16 x i32> %exponent to <16 x float>
  %y = fmul <16 x float> %p7, %power
  %result = select <16 x i1> %low, <16 x float> zeroinitializer, <16 x float> %y
  ret <16 x float> %result
}

define private void @attend_work(ptr %job, i64 %first_unit, i64 %end_unit) {
  %frame_at = getelementptr %Job, ptr %job, i32 0, i32 14
  %frame = load ptr, ptr %frame_at
  %args = getelementptr %CallFrame, ptr %frame, i32 0, i32 5
  %results = getelementptr %CallFrame, ptr %frame, i32 0, i32 6
  %q_all = call ptr @data(ptr %args, i64 0)
  %k_all = call ptr @data(ptr %args, i64 1)
  %v_all = call ptr @data(ptr %args, i64 2)
  %slots_all = call ptr @data(ptr %args, i64 3)
  %start_all = call ptr @data(ptr %args, i64 4)
  %y_all = call ptr @data(ptr %results, i64 0)
  %groups = call i64 @dim(ptr %args, i64 0, i64 1)
  %heads = call i64 @dim(ptr %args, i64 0, i64 2)
  %width = call i64 @dim(ptr %args, i64 0, i64 3)
  %capacity = call i64 @dim(ptr %args, i64 1, i64 2)
  %v_width = call i64 @dim(ptr %args, i64 2, i64 3)
  %all_heads = mul i64 %groups, %heads
  %sixteen_k = mul i64 %width, 16
  %highest = alloca float, i64 %heads
  %total = alloca float, i64 %heads
  %scores = alloca <16 x float>
  br label %unit

unit:
  %u = phi i64 [%first_unit, %0], [%u_next, %unit_done]
  %row = udiv i64 %u, %groups
  %group = urem i64 %u, %groups
  %first_at = getelementptr [2 x i32], ptr %slots_all, i64 %row, i64 0
  %first_32 = load i32, ptr %first_at
  %first = sext i32 %first_32 to i64
  %end_at = getelementptr [2 x i32], ptr %slots_all, i64 %row, i64 1
  %end_32 = load i32, ptr %end_at
  %end = sext i32 %end_32 to i64
  %skip_heads = mul i64 %u, %heads
  %skip_q = mul i64 %skip_heads, %width
  %q = getelementptr float, ptr %q_all, i64 %skip_q
  %skip_y = mul i64 %skip_heads, %v_width
  %y = getelementptr float, ptr %y_all, i64 %skip_y
  %skip_slots = mul i64 %u, %capacity
  %skip_k = mul i64 %skip_slots, %width
  %k = getelementptr float, ptr %k_all, i64 %skip_k
  %skip_v = mul i64 %skip_slots, %v_width
  %v = getelementptr float, ptr %v_all, i64 %skip_v
  %skip_start = mul i64 %group, %heads
  %start_highest = getelementptr float, ptr %start_all, i64 %skip_start
  %start_total = getelementptr float, ptr %start_highest, i64 %all_heads
  %state_bytes = mul i64 %heads, 4
  call void @llvm.memcpy.p0.p0.i64(ptr %highest, ptr %start_highest, i64 %state_bytes, i1 false)
  call void @llvm.memcpy.p0.p0.i64(ptr %total, ptr %start_total, i64 %state_bytes, i1 false)
  %y_size = mul i64 %heads, %v_width
  %y_bytes = mul i64 %y_size, 4
  call void @llvm.memset.p0.i64(ptr %y, i8 0, i64 %y_bytes, i1 false)
  br label %sixteen

sixteen:  ; slots
  %s = phi i64 [%first, %unit], [%s_next, %sixteen_done]
  %left = sub i64 %end, %s
  %some = icmp sgt i64 %left, 0
  br i1 %some, label %sixteen_go, label %divide

sixteen_go:
  %count = call i64 @llvm.umin.i64(i64 %left, i64 16)
  %k_skip = mul i64 %s, %width
  %k_16 = getelementptr float, ptr %k, i64 %k_skip
  %v_skip = mul i64 %s, %v_width
  %v_16 = getelementptr float, ptr %v, i64 %v_skip
  br label %head

head:
  %m = phi i64 [0, %sixteen_go], [%m_next, %head_done]
  %q_skip = mul i64 %m, %width
  %q_head = getelementptr float, ptr %q, i64 %q_skip
  store <16 x float> splat (float 0xC6293E5940000000), ptr %scores
  br label %score

score:
  %i = phi i64 [0, %head], [%i_next, %score_done]
  %k_slot_skip = mul i64 %i, %width
  %k_slot = getelementptr float, ptr %k_16, i64 %k_slot_skip
  br label %score_more

score_more:
  %c = phi i64 [0, %score], [%c_next, %score_more]
  %sum = phi <16 x float> [zeroinitializer, %score], [%sum_next, %score_more]
  %q_at = getelementptr float, ptr %q_head, i64 %c
  %q16 = load <16 x float>, ptr %q_at, align 4
  %k_at = getelementptr float, ptr %k_slot, i64 %c
  %k16 = load <16 x float>, ptr %k_at, align 4
  %ahead_at = getelementptr float, ptr %k_at, i64 %sixteen_k
  call void @llvm.prefetch.p0(ptr %ahead_at, i32 0, i32 3, i32 1)
  %v_ahead_c = add i64 %k_slot_skip, %c
  %v_ahead_at = getelementptr float, ptr %v_16, i64 %v_ahead_c
  call void @llvm.prefetch.p0(ptr %v_ahead_at, i32 0, i32 3, i32 1)
  %sum_next = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %q16, <16 x float> %k16, <16 x float> %sum)
  %c_next = add i64 %c, 16
  %more_columns = icmp ult i64 %c_next, %width
  br i1 %more_columns, label %score_more, label %score_done

score_done:
  %a_score = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %sum_next)
  %score_at = getelementptr float, ptr %scores, i64 %i
  store float %a_score, ptr %score_at
  %i_next = add i64 %i, 1
  %more_slots = icmp ult i64 %i_next, %count
  br i1 %more_slots, label %score, label %soften

soften:
  %all_scores = load <16 x float>, ptr %scores
  %here = call float @llvm.vector.reduce.fmax.v16f32(<16 x float> %all_scores)
  %highest_at = getelementptr float, ptr %highest, i64 %m
  %before = load float, ptr %highest_at
  %higher = fcmp ogt float %here, %before
  %raised = select i1 %higher, float %here, float %before
  store float %raised, ptr %highest_at
  %raised_one = insertelement <16 x float> poison, float %raised, i32 0
  %raised_16 = shufflevector <16 x float> %raised_one, <16 x float> poison, <16 x i32> zeroinitializer
  %below = fsub <16 x float> %all_scores, %raised_16
  %weights = call <16 x float> @exp(<16 x float> %below)
  store <16 x float> %weights, ptr %scores
  %fallen = fsub float %before, %raised
  %fallen_one = insertelement <16 x float> zeroinitializer, float %fallen, i32 0
  %kept = call <16 x float> @exp(<16 x float> %fallen_one)
  %keep = extractelement <16 x float> %kept, i32 0
  %keep_one = insertelement <16 x float> poison, float %keep, i32 0
  %keep_16 = shufflevector <16 x float> %keep_one, <16 x float> poison, <16 x i32> zeroinitializer
  %added = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %weights)
  %total_at = getelementptr float, ptr %total, i64 %m
  %total_before = load float, ptr %total_at
  %total_kept = fmul float %total_before, %keep
  %total_now = fadd float %total_kept, %added
  store float %total_now, ptr %total_at
  %y_skip = mul i64 %m, %v_width
  %y_head = getelementptr float, ptr %y, i64 %y_skip
  br label %mix

mix:  ; 16 columns
  %d = phi i64 [0, %soften], [%d_next, %mix_done]
  %y_at = getelementptr float, ptr %y_head, i64 %d
  %y_before = load <16 x float>, ptr %y_at, align 4
  %y_kept = fmul <16 x float> %y_before, %keep_16
  br label %mix_more

mix_more:
  %j = phi i64 [0, %mix], [%j_next, %mix_more]
  %mixed = phi <16 x float> [%y_kept, %mix], [%mixed_next, %mix_more]
  %weight_at = getelementptr float, ptr %scores, i64 %j
  %weight = load float, ptr %weight_at
  %weight_one = insertelement <16 x float> poison, float %weight, i32 0
  %weight_16 = shufflevector <16 x float> %weight_one, <16 x float> poison, <16 x i32> zeroinitializer
  %v_slot_skip = mul i64 %j, %v_width
  %v_slot = getelementptr float, ptr %v_16, i64 %v_slot_skip
  %v_at = getelementptr float, ptr %v_slot, i64 %d
  %v16 = load <16 x float>, ptr %v_at, align 4
  %mixed_next = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %weight_16, <16 x float> %v16, <16 x float> %mixed)
  %j_next = add i64 %j, 1
  %more_mixed = icmp ult i64 %j_next, %count
  br i1 %more_mixed, label %mix_more, label %mix_done

mix_done:
  store <16 x float> %mixed_next, ptr %y_at, align 4
  %d_next = add i64 %d, 16
  %more_d = icmp ult i64 %d_next, %v_width
  br i1 %more_d, label %mix, label %head_done

head_done:
  %m_next = add i64 %m, 1
  %more_heads = icmp ult i64 %m_next, %heads
  br i1 %more_heads, label %head, label %sixteen_done

sixteen_done:
  %s_next = add i64 %s, 16
  br label %sixteen

divide:
  %n = phi i64 [0, %sixteen], [%n_next, %divided]
  %sum_at = getelementptr float, ptr %total, i64 %n
  %sum_of = load float, ptr %sum_at
  %nothing = fcmp olt float %sum_of, 0x39B4484C00000000  ; padding may see nothing; the total of others is at least 1
  %divisor = select i1 %nothing, float 1.0, float %sum_of
  %divisor_one = insertelement <16 x float> poison, float %divisor, i32 0
  %divisor_16 = shufflevector <16 x float> %divisor_one, <16 x float> poison, <16 x i32> zeroinitializer
  %out_skip = mul i64 %n, %v_width
  %out = getelementptr float, ptr %y, i64 %out_skip
  br label %divide_more

divide_more:
  %e = phi i64 [0, %divide], [%e_next, %divide_more]
  %out_at = getelementptr float, ptr %out, i64 %e
  %undivided = load <16 x float>, ptr %out_at, align 4
  %divided_16 = fdiv <16 x float> %undivided, %divisor_16
  store <16 x float> %divided_16, ptr %out_at, align 4
  %e_next = add i64 %e, 16
  %more_e = icmp ult i64 %e_next, %v_width
  br i1 %more_e, label %divide_more, label %divided

divided:
  %n_next = add i64 %n, 1
  %more_n = icmp ult i64 %n_next, %heads
  br i1 %more_n, label %divide, label %unit_done

unit_done:
  %u_next = add i64 %u, 1
  %more_units = icmp ult i64 %u_next, %end_unit
  br i1 %more_units, label %unit, label %stop

stop:
  ret void
}

define ptr @attend(ptr %frame) {
  %asked = call i1 @only_asked(ptr %frame)
  br i1 %asked, label %stop, label %go

go:
  %args = getelementptr %CallFrame, ptr %frame, i32 0, i32 5
  %slots = call ptr @data(ptr %args, i64 3)
  %rows = call i64 @dim(ptr %args, i64 0, i64 0)
  %groups = call i64 @dim(ptr %args, i64 0, i64 1)
  %width = call i64 @dim(ptr %args, i64 0, i64 3)
  %v_width = call i64 @dim(ptr %args, i64 2, i64 3)
  br label %row

row:  ; the one with the most slots says how many key heads are a block
  %r = phi i64 [0, %go], [%r_next, %row]
  %most = phi i64 [1, %go], [%most_next, %row]
  %first_at = getelementptr [2 x i32], ptr %slots, i64 %r, i64 0
  %first_32 = load i32, ptr %first_at
  %end_at = getelementptr [2 x i32], ptr %slots, i64 %r, i64 1
  %end_32 = load i32, ptr %end_at
  %own_32 = sub i32 %end_32, %first_32
  %own = sext i32 %own_32 to i64
  %most_next = call i64 @llvm.smax.i64(i64 %most, i64 %own)
  %r_next = add i64 %r, 1
  %more = icmp ult i64 %r_next, %rows
  br i1 %more, label %row, label %share

share:
  %units = mul i64 %rows, %groups
  %both = add i64 %width, %v_width
  %slot_bytes = mul i64 %both, 4
  %unit_bytes = mul i64 %most_next, %slot_bytes
  %whole = udiv i64 $block, %unit_bytes
  %some = call i64 @llvm.umax.i64(i64 %whole, i64 1)
  call void @share(ptr %frame, ptr @attend_work, i64 0, i64 %units, i64 %some, i64 0, i64 0)
  br label %stop

stop:
  ret ptr null
}

declare i64 @llvm.smax.i64(i64, i64)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
