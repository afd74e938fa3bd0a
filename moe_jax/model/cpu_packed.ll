; Rows times the transpose of a packed matrix (packed.py), widened in registers.
;
;   operands  x float32 [R, 2 h], values uint8 [outputs, 2 h], exponents uint8 [outputs, h], base uint8 [outputs],
;             listed bfloat16 [chunks, L], places int32 [chunks, L, 2];  h is at least 16, all others at least 1,
;             outputs a multiple of chunks, and a list ends with its first zero
;   result    float32 [R, outputs]
;
; Columns i and h + i share a byte of exponents, and are taken together, 16 of them at a time.

define private <16 x i32> @same(i32 %value) alwaysinline {
  %one = insertelement <16 x i32> poison, i32 %value, i32 0
  %all = shufflevector <16 x i32> %one, <16 x i32> poison, <16 x i32> zeroinitializer
  ret <16 x i32> %all
}

; The sum so far, and 16 weights times x. A byte is sign-extended so that one shift brings sign and mantissa into place.
define private <16 x float> @add(<16 x float> %sum, ptr %values, <16 x i32> %code, <16 x i32> %base, ptr %x,
                                 <16 x i1> %counts) alwaysinline {
  %bytes = load <16 x i8>, ptr %values, align 1
  %extended = sext <16 x i8> %bytes to <16 x i32>
  %shifted = shl <16 x i32> %extended, splat (i32 16)
  %sign_mantissa = and <16 x i32> %shifted, splat (i32 u0x807F0000)
  %above = add <16 x i32> %code, %base
  %coded = icmp ne <16 x i32> %code, zeroinitializer
  %exponent = select <16 x i1> %coded, <16 x i32> %above, <16 x i32> zeroinitializer
  %in_place = shl <16 x i32> %exponent, splat (i32 23)
  %bits = or <16 x i32> %sign_mantissa, %in_place
  %weights = bitcast <16 x i32> %bits to <16 x float>
  %x16 = load <16 x float>, ptr %x, align 4
  %more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %weights, <16 x float> %x16, <16 x float> %sum)
  %next = select <16 x i1> %counts, <16 x float> %more, <16 x float> %sum
  ret <16 x float> %next
}

define private void @packed_work(ptr %job, i64 %first, i64 %end) {
start:
  %x_at_job = getelementptr %Job, ptr %job, i32 0, i32 7
  %x = load ptr, ptr %x_at_job
  %y_at_job = getelementptr %Job, ptr %job, i32 0, i32 8
  %y = load ptr, ptr %y_at_job
  %rows_at = getelementptr %Job, ptr %job, i32 0, i32 9
  %rows = load i64, ptr %rows_at
  %width_at = getelementptr %Job, ptr %job, i32 0, i32 10
  %width = load i64, ptr %width_at
  %out_at = getelementptr %Job, ptr %job, i32 0, i32 5
  %out = load i64, ptr %out_at
  %values_at = getelementptr %Job, ptr %job, i32 0, i32 11, i32 0
  %values = load ptr, ptr %values_at
  %exponents_at = getelementptr %Job, ptr %job, i32 0, i32 11, i32 1
  %exponents = load ptr, ptr %exponents_at
  %bases_at = getelementptr %Job, ptr %job, i32 0, i32 11, i32 2
  %bases = load ptr, ptr %bases_at
  %listed_at_job = getelementptr %Job, ptr %job, i32 0, i32 11, i32 3
  %listed = load ptr, ptr %listed_at_job
  %places_at = getelementptr %Job, ptr %job, i32 0, i32 11, i32 4
  %places = load ptr, ptr %places_at
  %chunks_at = getelementptr %Job, ptr %job, i32 0, i32 12
  %chunks = load i64, ptr %chunks_at
  %list_length_at = getelementptr %Job, ptr %job, i32 0, i32 13
  %list_length = load i64, ptr %list_length_at
  %h = lshr i64 %width, 1
  %full = and i64 %h, -16
  %rest = and i64 %h, 15
  %has_rest = icmp ne i64 %rest, 0
  ; What is over is the end of a last 16 columns, whose beginning has been counted already.
  %last = sub i64 %h, 16
  %rest32 = trunc i64 %rest to i32
  %counted = sub i32 16, %rest32
  %counted16 = call <16 x i32> @same(i32 %counted)
  %lanes = add <16 x i32> zeroinitializer, <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
                                            i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %in_rest = icmp uge <16 x i32> %lanes, %counted16
  br label %output

output:
  %at = phi i64 [%first, %start], [%at_next, %output_done]
  %base_at = getelementptr i8, ptr %bases, i64 %at
  %base8 = load i8, ptr %base_at
  %base32 = zext i8 %base8 to i32
  %base = call <16 x i32> @same(i32 %base32)
  %skip = mul i64 %at, %h
  %exponents_row = getelementptr i8, ptr %exponents, i64 %skip
  %skip_values = mul i64 %at, %width
  %values_low = getelementptr i8, ptr %values, i64 %skip_values
  %values_high = getelementptr i8, ptr %values_low, i64 %h
  br label %row

row:
  %r = phi i64 [0, %output], [%r_next, %row_done]
  %skip_x = mul i64 %r, %width
  %x_low = getelementptr float, ptr %x, i64 %skip_x
  %x_high = getelementptr float, ptr %x_low, i64 %h
  br label %columns

columns:
  %i = phi i64 [0, %row], [%i_next, %columns]
  %low = phi <16 x float> [zeroinitializer, %row], [%low_next, %columns]
  %high = phi <16 x float> [zeroinitializer, %row], [%high_next, %columns]
  %codes_at = getelementptr i8, ptr %exponents_row, i64 %i
  %codes8 = load <16 x i8>, ptr %codes_at, align 1
  %codes = zext <16 x i8> %codes8 to <16 x i32>
  %code_low = and <16 x i32> %codes, splat (i32 15)
  %code_high = lshr <16 x i32> %codes, splat (i32 4)
  %values_low_at = getelementptr i8, ptr %values_low, i64 %i
  %values_high_at = getelementptr i8, ptr %values_high, i64 %i
  %x_low_at = getelementptr float, ptr %x_low, i64 %i
  %x_high_at = getelementptr float, ptr %x_high, i64 %i
  %low_next = call <16 x float> @add(<16 x float> %low, ptr %values_low_at, <16 x i32> %code_low, <16 x i32> %base,
                                     ptr %x_low_at, <16 x i1> splat (i1 true))
  %high_next = call <16 x float> @add(<16 x float> %high, ptr %values_high_at, <16 x i32> %code_high, <16 x i32> %base,
                                      ptr %x_high_at, <16 x i1> splat (i1 true))
  %i_next = add i64 %i, 16
  %more_columns = icmp ult i64 %i_next, %full
  br i1 %more_columns, label %columns, label %columns_done

columns_done:
  br i1 %has_rest, label %rest_columns, label %row_done

rest_columns:
  %rest_codes_at = getelementptr i8, ptr %exponents_row, i64 %last
  %rest_codes8 = load <16 x i8>, ptr %rest_codes_at, align 1
  %rest_codes = zext <16 x i8> %rest_codes8 to <16 x i32>
  %rest_code_low = and <16 x i32> %rest_codes, splat (i32 15)
  %rest_code_high = lshr <16 x i32> %rest_codes, splat (i32 4)
  %rest_low_at = getelementptr i8, ptr %values_low, i64 %last
  %rest_high_at = getelementptr i8, ptr %values_high, i64 %last
  %rest_x_low = getelementptr float, ptr %x_low, i64 %last
  %rest_x_high = getelementptr float, ptr %x_high, i64 %last
  %low_rest = call <16 x float> @add(<16 x float> %low_next, ptr %rest_low_at, <16 x i32> %rest_code_low,
                                     <16 x i32> %base, ptr %rest_x_low, <16 x i1> %in_rest)
  %high_rest = call <16 x float> @add(<16 x float> %high_next, ptr %rest_high_at, <16 x i32> %rest_code_high,
                                      <16 x i32> %base, ptr %rest_x_high, <16 x i1> %in_rest)
  br label %row_done

row_done:
  %low_sum = phi <16 x float> [%low_next, %columns_done], [%low_rest, %rest_columns]
  %high_sum = phi <16 x float> [%high_next, %columns_done], [%high_rest, %rest_columns]
  %both = fadd <16 x float> %low_sum, %high_sum
  %sum = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %both)
  %skip_y = mul i64 %r, %out
  %y_index = add i64 %skip_y, %at
  %y_at = getelementptr float, ptr %y, i64 %y_index
  store float %sum, ptr %y_at
  %r_next = add i64 %r, 1
  %more_rows = icmp ult i64 %r_next, %rows
  br i1 %more_rows, label %row, label %output_done

output_done:
  %at_next = add i64 %at, 1
  %more_outputs = icmp ult i64 %at_next, %end
  br i1 %more_outputs, label %output, label %lists

lists:  ; of the chunks that these outputs belong to
  %chunk_outputs = udiv i64 %out, %chunks
  %chunk_first = udiv i64 %first, %chunk_outputs
  br label %chunk

chunk:
  %c = phi i64 [%chunk_first, %lists], [%c_next, %chunk_done]
  %skip_list = mul i64 %c, %list_length
  %skip_outputs = mul i64 %c, %chunk_outputs
  br label %entry

entry:
  %k = phi i64 [0, %chunk], [%k_next, %entry_done]
  %e = add i64 %skip_list, %k
  %listed_at = getelementptr i16, ptr %listed, i64 %e
  %listed16 = load i16, ptr %listed_at
  %unused = icmp eq i16 %listed16, 0
  br i1 %unused, label %chunk_done, label %placed

placed:
  %listed32 = zext i16 %listed16 to i32
  %listed_bits = shl i32 %listed32, 16
  %weight = bitcast i32 %listed_bits to float
  %e2 = shl i64 %e, 1
  %place_at = getelementptr i32, ptr %places, i64 %e2
  %place_output32 = load i32, ptr %place_at
  %column_at = getelementptr i32, ptr %place_at, i64 1
  %column32 = load i32, ptr %column_at
  %place_output = zext i32 %place_output32 to i64
  %column = zext i32 %column32 to i64
  %of_all = add i64 %skip_outputs, %place_output
  %after_first = icmp uge i64 %of_all, %first
  %before_end = icmp ult i64 %of_all, %end
  %of_part = and i1 %after_first, %before_end
  %of_row = icmp ult i64 %column, %width
  %is_here = and i1 %of_part, %of_row
  br i1 %is_here, label %listed_row, label %entry_done

listed_row:
  %q = phi i64 [0, %placed], [%q_next, %listed_row]
  %skip_x_row = mul i64 %q, %width
  %x_index = add i64 %skip_x_row, %column
  %x_at = getelementptr float, ptr %x, i64 %x_index
  %x_value = load float, ptr %x_at
  %skip_y_row = mul i64 %q, %out
  %sum_index = add i64 %skip_y_row, %of_all
  %sum_at = getelementptr float, ptr %y, i64 %sum_index
  %sum_before = load float, ptr %sum_at
  %term = fmul float %weight, %x_value
  %sum_after = fadd float %sum_before, %term
  store float %sum_after, ptr %sum_at
  %q_next = add i64 %q, 1
  %more_listed_rows = icmp ult i64 %q_next, %rows
  br i1 %more_listed_rows, label %listed_row, label %entry_done

entry_done:
  %k_next = add i64 %k, 1
  %more_entries = icmp ult i64 %k_next, %list_length
  br i1 %more_entries, label %entry, label %chunk_done

chunk_done:
  %c_next = add i64 %c, 1
  %next_outputs = mul i64 %c_next, %chunk_outputs
  %more_chunks = icmp ult i64 %next_outputs, %end
  br i1 %more_chunks, label %chunk, label %stop

stop:
  ret void
}

define ptr @packed_product(ptr %frame) {
  %asked = call i1 @only_asked(ptr %frame)
  br i1 %asked, label %stop, label %go

go:
  %args = getelementptr %CallFrame, ptr %frame, i32 0, i32 5
  %chunks = call i64 @dim(ptr %args, i64 4, i64 0)
  %list_length = call i64 @dim(ptr %args, i64 4, i64 1)
  call void @product(ptr %frame, ptr @packed_work, i64 5, i64 %chunks, i64 %list_length, i64 $block)
  br label %stop

stop:
  ret ptr null
}
