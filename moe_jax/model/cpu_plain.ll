; Rows times the transpose of a matrix of $name weights. cpu.py has one for each dtype: it puts in its name and type, how 16
; such weights become float32, and what is fetched ahead.
;
;   operands  x float32 [R, width], weights [outputs, width]
;   result    float32 [R, outputs]

define private <16 x float> @${name}_wide(<16 x $type> %stored) alwaysinline {
  $widen
  ret <16 x float> %wide
}

; The sum so far, and 16 weights times x.
define private <16 x float> @${name}_more(<16 x float> %sum, ptr %row, ptr %x, i64 %i, i64 %skip) alwaysinline {
  %column = add i64 %i, %skip
  %at = getelementptr $type, ptr %row, i64 %column
  %stored = load <16 x $type>, ptr %at, align 1
  %weights = call <16 x float> @${name}_wide(<16 x $type> %stored)
  %x_at = getelementptr float, ptr %x, i64 %column
  %x16 = load <16 x float>, ptr %x_at, align 4
  %more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %weights, <16 x float> %x16, <16 x float> %sum)
  ret <16 x float> %more
}

define private void @${name}_work(ptr %job, i64 %first, i64 %end) {
  %x_at = getelementptr %Job, ptr %job, i32 0, i32 7
  %x = load ptr, ptr %x_at
  %y_at = getelementptr %Job, ptr %job, i32 0, i32 8
  %y = load ptr, ptr %y_at
  %rows_at = getelementptr %Job, ptr %job, i32 0, i32 9
  %rows = load i64, ptr %rows_at
  %width_at = getelementptr %Job, ptr %job, i32 0, i32 10
  %width = load i64, ptr %width_at
  %outputs_at = getelementptr %Job, ptr %job, i32 0, i32 5
  %outputs = load i64, ptr %outputs_at
  %weights_at = getelementptr %Job, ptr %job, i32 0, i32 11, i32 0
  %weights = load ptr, ptr %weights_at
  %wide = and i64 %width, -64
  %whole = and i64 %width, -16
  br label %output

output:
  %o = phi i64 [%first, %0], [%o_next, %output_done]
  %skip_weights = mul i64 %o, %width
  %weights_row = getelementptr $type, ptr %weights, i64 %skip_weights
  br label %row

row:
  %r = phi i64 [0, %output], [%r_next, %row_done]
  %skip_x = mul i64 %r, %width
  %x_row = getelementptr float, ptr %x, i64 %skip_x
  br label %four

four:  ; times 16 columns
  %i = phi i64 [0, %row], [%i_next, %four_more]
  %a = phi <16 x float> [zeroinitializer, %row], [%a_next, %four_more]
  %b = phi <16 x float> [zeroinitializer, %row], [%b_next, %four_more]
  %c = phi <16 x float> [zeroinitializer, %row], [%c_next, %four_more]
  %d = phi <16 x float> [zeroinitializer, %row], [%d_next, %four_more]
  %is_four = icmp ult i64 %i, %wide
  br i1 %is_four, label %four_more, label %one

four_more:
  %here = getelementptr $type, ptr %weights_row, i64 %i
  $prefetch
  %a_next = call <16 x float> @${name}_more(<16 x float> %a, ptr %weights_row, ptr %x_row, i64 %i, i64 0)
  %b_next = call <16 x float> @${name}_more(<16 x float> %b, ptr %weights_row, ptr %x_row, i64 %i, i64 16)
  %c_next = call <16 x float> @${name}_more(<16 x float> %c, ptr %weights_row, ptr %x_row, i64 %i, i64 32)
  %d_next = call <16 x float> @${name}_more(<16 x float> %d, ptr %weights_row, ptr %x_row, i64 %i, i64 48)
  %i_next = add i64 %i, 64
  br label %four

one:
  %j = phi i64 [%i, %four], [%j_next, %one_more]
  %e = phi <16 x float> [%a, %four], [%e_next, %one_more]
  %is_one = icmp ult i64 %j, %whole
  br i1 %is_one, label %one_more, label %sum

one_more:
  %e_next = call <16 x float> @${name}_more(<16 x float> %e, ptr %weights_row, ptr %x_row, i64 %j, i64 0)
  %j_next = add i64 %j, 16
  br label %one

sum:
  %eb = fadd <16 x float> %e, %b
  %cd = fadd <16 x float> %c, %d
  %ebcd = fadd <16 x float> %eb, %cd
  %most = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %ebcd)
  br label %last

last:  ; columns, fewer than 16
  %k = phi i64 [%j, %sum], [%k_next, %last_more]
  %s = phi float [%most, %sum], [%s_next, %last_more]
  %is_last = icmp ult i64 %k, %width
  br i1 %is_last, label %last_more, label %row_done

last_more:
  %last_at = getelementptr $type, ptr %weights_row, i64 %k
  %last_stored = load $type, ptr %last_at, align 1
  %last_alone = insertelement <16 x $type> zeroinitializer, $type %last_stored, i32 0
  %last_wide = call <16 x float> @${name}_wide(<16 x $type> %last_alone)
  %last_weight = extractelement <16 x float> %last_wide, i32 0
  %last_x_at = getelementptr float, ptr %x_row, i64 %k
  %last_x = load float, ptr %last_x_at
  %term = fmul float %last_weight, %last_x
  %s_next = fadd float %s, %term
  %k_next = add i64 %k, 1
  br label %last

row_done:
  %skip_y = mul i64 %r, %outputs
  %y_index = add i64 %skip_y, %o
  %result_at = getelementptr float, ptr %y, i64 %y_index
  store float %s, ptr %result_at
  %r_next = add i64 %r, 1
  %more_rows = icmp ult i64 %r_next, %rows
  br i1 %more_rows, label %row, label %output_done

output_done:
  %o_next = add i64 %o, 1
  %more_outputs = icmp ult i64 %o_next, %end
  br i1 %more_outputs, label %output, label %stop

stop:
  ret void
}

define ptr @${name}_product(ptr %frame) {
  %asked = call i1 @only_asked(ptr %frame)
  br i1 %asked, label %stop, label %go

go:
  call void @product(ptr %frame, ptr @${name}_work, i64 1, i64 0, i64 0, i64 $block)
  br label %stop

stop:
  ret ptr null
}
