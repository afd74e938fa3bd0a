; What the loops of cpu_plain.ll, cpu_packed.ll and cpu_attention.ll have in common: what XLA hands over, and how its
; threads share the outputs. See cpu.py.
;
; Structures and constants are those of XLA's xla/ffi/api/c_api.h, version 0.3.

%Extension = type { i64, i32, ptr, ptr }                      ; struct_size, type, next, metadata
%Metadata = type { i64, { i64, ptr, i32, i32 }, i32, i64 }    ; struct_size, version (last: major, minor), traits, state
%Buffer = type { i64, ptr, i32, ptr, i64, ptr }               ; struct_size, extension, dtype, data, rank, dims
%Buffers = type { i64, ptr, i64, ptr, ptr }                   ; struct_size, extension, size, types, buffers
%CallFrame = type { i64, ptr, ptr, ptr, i32, %Buffers, %Buffers }  ; ..., extension, api, context, stage, args, results
%Api = type { i64, ptr, { i64, ptr, i32, i32 }, ptr, [13 x ptr] }  ; ..., functions; of these 2 destroys an error, 11
                                                                   ; schedules a task, 12 tells the number of threads
%Schedule = type { i64, ptr, ptr, ptr, ptr }                  ; struct_size, extension, context, task, its argument
%NumThreads = type { i64, ptr, ptr, ptr }                     ; struct_size, extension, context, number
%Destroy = type { i64, ptr, ptr }                             ; struct_size, extension, error

; x float32 [rows, width] times weights [outputs, width], in blocks of outputs that threads take as they come: one that
; wakes late, or has other things to do, does less of it. One may come when everything is done, even long after the call
; is over: the job is freed by the last to leave it.
%Job = type { i64, i64, i64,             ; next block; blocks done; threads that are here or may still come
              i64, i64, i64,             ; blocks; outputs of each; outputs
              ptr, ptr, ptr, i64, i64,   ; work (job, first output, end); x; result; rows; width
              [5 x ptr], i64, i64,       ; parts of the weights; of packed ones: chunks, length of their lists
              ptr }                      ; the call, which lasts until every block is done

declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()

define private ptr @buffer(ptr %buffers, i64 %index) alwaysinline {
  %all_at = getelementptr %Buffers, ptr %buffers, i32 0, i32 4
  %all = load ptr, ptr %all_at
  %buffer_at = getelementptr ptr, ptr %all, i64 %index
  %buffer = load ptr, ptr %buffer_at
  ret ptr %buffer
}

define private ptr @data(ptr %buffers, i64 %index) alwaysinline {
  %buffer = call ptr @buffer(ptr %buffers, i64 %index)
  %data_at = getelementptr %Buffer, ptr %buffer, i32 0, i32 3
  %data = load ptr, ptr %data_at
  ret ptr %data
}

define private i64 @dim(ptr %buffers, i64 %index, i64 %axis) alwaysinline {
  %buffer = call ptr @buffer(ptr %buffers, i64 %index)
  %dims_at = getelementptr %Buffer, ptr %buffer, i32 0, i32 5
  %dims = load ptr, ptr %dims_at
  %dim_at = getelementptr i64, ptr %dims, i64 %axis
  %dim = load i64, ptr %dim_at
  ret i64 %dim
}

; Whether XLA only asks which version of the interface this is; then it is told.
define private i1 @only_asked(ptr %frame) {
  %extension_at = getelementptr %CallFrame, ptr %frame, i32 0, i32 1
  %extension = load ptr, ptr %extension_at
  %extended = icmp ne ptr %extension, null
  br i1 %extended, label %which, label %no

which:
  %type_at = getelementptr %Extension, ptr %extension, i32 0, i32 1
  %type = load i32, ptr %type_at
  %asked = icmp eq i32 %type, 1
  br i1 %asked, label %tell, label %no

tell:
  %metadata_at = getelementptr %Extension, ptr %extension, i32 0, i32 3
  %metadata = load ptr, ptr %metadata_at
  %major = getelementptr %Metadata, ptr %metadata, i32 0, i32 1, i32 2
  store i32 0, ptr %major
  %minor = getelementptr %Metadata, ptr %metadata, i32 0, i32 1, i32 3
  store i32 3, ptr %minor
  ret i1 true

no:
  ret i1 false
}

; Calls a function of XLA's. Whether there is one and it succeeded.
define private i1 @succeeds(ptr %frame, i32 %function, ptr %args) {
  %api_at = getelementptr %CallFrame, ptr %frame, i32 0, i32 2
  %api = load ptr, ptr %api_at
  %api_size = load i64, ptr %api
  %known = icmp uge i64 %api_size, 152  ; of `%Api`
  br i1 %known, label %go, label %unknown

unknown:
  ret i1 false

go:
  %function_at = getelementptr %Api, ptr %api, i32 0, i32 4, i32 %function
  %call = load ptr, ptr %function_at
  %error = call ptr %call(ptr %args)
  %good = icmp eq ptr %error, null
  br i1 %good, label %done, label %bad

bad:
  %destroy_args = alloca %Destroy
  store %Destroy { i64 24, ptr null, ptr null }, ptr %destroy_args
  %error_at = getelementptr %Destroy, ptr %destroy_args, i32 0, i32 2
  store ptr %error, ptr %error_at
  %destroy_at = getelementptr %Api, ptr %api, i32 0, i32 4, i32 2
  %destroy = load ptr, ptr %destroy_at
  call void %destroy(ptr %destroy_args)
  br label %done

done:
  ret i1 %good
}

; Works at blocks until none is left.
define private void @run(ptr %job) {
  %blocks_at = getelementptr %Job, ptr %job, i32 0, i32 3
  %blocks = load i64, ptr %blocks_at
  %size_at = getelementptr %Job, ptr %job, i32 0, i32 4
  %size = load i64, ptr %size_at
  %outputs_at = getelementptr %Job, ptr %job, i32 0, i32 5
  %outputs = load i64, ptr %outputs_at
  %work_at = getelementptr %Job, ptr %job, i32 0, i32 6
  %work = load ptr, ptr %work_at
  %done_at = getelementptr %Job, ptr %job, i32 0, i32 1
  br label %next

next:
  %block = atomicrmw add ptr %job, i64 1 monotonic
  %is_one = icmp ult i64 %block, %blocks
  br i1 %is_one, label %do, label %stop

do:
  %first = mul i64 %block, %size
  %full = add i64 %first, %size
  %short = icmp ult i64 %outputs, %full
  %end = select i1 %short, i64 %outputs, i64 %full
  call void %work(ptr %job, i64 %first, i64 %end)
  %before = atomicrmw add ptr %done_at, i64 1 release
  br label %next

stop:
  ret void
}

define private void @leave(ptr %job) {
  %here_at = getelementptr %Job, ptr %job, i32 0, i32 2
  %here = atomicrmw sub ptr %here_at, i64 1 acq_rel
  %last = icmp eq i64 %here, 1
  br i1 %last, label %free, label %stop

free:
  call void @free(ptr %job)
  br label %stop

stop:
  ret void
}

; A product often follows another at once, and to wake a thread takes as long as a small one. So a thread stays for a moment
; and one looks for a next job, which may lie here for it. Meanwhile any other thread may have its core. A job that nobody
; has taken before the next one comes goes on without a helper, or is over.
@next_job = private global ptr null
@looking = private global i64 0  ; threads

; What another thread does.
define private void @help(ptr %scheduled) {
  br label %take

take:
  %job = phi ptr [%scheduled, %0], [%found, %taken]
  call void @run(ptr %job)
  call void @leave(ptr %job)
  %before = atomicrmw add ptr @looking, i64 1 monotonic
  %alone = icmp eq i64 %before, 0  ; one is enough for the one job
  br i1 %alone, label %look, label %stop

look:
  %turn = phi i64 [0, %take], [%turn_next, %look_again]
  %found = atomicrmw xchg ptr @next_job, ptr null acquire
  %nothing = icmp eq ptr %found, null
  br i1 %nothing, label %look_again, label %taken

look_again:
  %ignored = call i32 @sched_yield()
  %turn_next = add i64 %turn, 1
  %go_on = icmp ult i64 %turn_next, $turns
  br i1 %go_on, label %look, label %stop

taken:
  %before_taken = atomicrmw sub ptr @looking, i64 1 monotonic
  br label %take

stop:
  %before_stop = atomicrmw sub ptr @looking, i64 1 monotonic
  ret void
}

; The whole product, in blocks of so many weights. What a job has to know besides is handed over.
define private void @product(ptr %frame, ptr %work, i64 %parts, i64 %chunks, i64 %list_length, i64 %block_weights) {
  %args = getelementptr %CallFrame, ptr %frame, i32 0, i32 5
  %results = getelementptr %CallFrame, ptr %frame, i32 0, i32 6
  %width = call i64 @dim(ptr %args, i64 0, i64 1)
  %outputs = call i64 @dim(ptr %results, i64 0, i64 1)
  %whole = udiv i64 %block_weights, %width
  %some = call i64 @llvm.umax.i64(i64 %whole, i64 1)
  call void @share(ptr %frame, ptr %work, i64 %parts, i64 %outputs, i64 %some, i64 %chunks, i64 %list_length)
  ret void
}

; Outputs, so many in a block, among the threads.
define private void @share(ptr %frame, ptr %work, i64 %parts, i64 %outputs, i64 %some, i64 %chunks, i64 %list_length) {
  %args = getelementptr %CallFrame, ptr %frame, i32 0, i32 5
  %results = getelementptr %CallFrame, ptr %frame, i32 0, i32 6
  %job_end = getelementptr %Job, ptr null, i32 1
  %job_size = ptrtoint ptr %job_end to i64
  %job = call ptr @malloc(i64 %job_size)
  %rows = call i64 @dim(ptr %args, i64 0, i64 0)
  %width = call i64 @dim(ptr %args, i64 0, i64 1)
  %up = add i64 %outputs, %some
  %up_less = sub i64 %up, 1
  %blocks = udiv i64 %up_less, %some

  ; How many threads there are; where XLA has none to lend, one.
  %number = alloca i64
  store i64 1, ptr %number
  %context_at = getelementptr %CallFrame, ptr %frame, i32 0, i32 3
  %context = load ptr, ptr %context_at
  %threads_args = alloca %NumThreads
  store %NumThreads { i64 32, ptr null, ptr null, ptr null }, ptr %threads_args
  %threads_context_at = getelementptr %NumThreads, ptr %threads_args, i32 0, i32 2
  store ptr %context, ptr %threads_context_at
  %number_at = getelementptr %NumThreads, ptr %threads_args, i32 0, i32 3
  store ptr %number, ptr %number_at
  %known = call i1 @succeeds(ptr %frame, i32 12, ptr %threads_args)
  %threads = load i64, ptr %number
  %useful = call i64 @llvm.umin.i64(i64 %threads, i64 %blocks)
  %here = call i64 @llvm.umax.i64(i64 %useful, i64 1)

  store i64 0, ptr %job
  %done_at = getelementptr %Job, ptr %job, i32 0, i32 1
  store i64 0, ptr %done_at
  %here_at = getelementptr %Job, ptr %job, i32 0, i32 2
  store i64 %here, ptr %here_at
  %blocks_at = getelementptr %Job, ptr %job, i32 0, i32 3
  store i64 %blocks, ptr %blocks_at
  %size_at = getelementptr %Job, ptr %job, i32 0, i32 4
  store i64 %some, ptr %size_at
  %outputs_at = getelementptr %Job, ptr %job, i32 0, i32 5
  store i64 %outputs, ptr %outputs_at
  %work_at = getelementptr %Job, ptr %job, i32 0, i32 6
  store ptr %work, ptr %work_at
  %x = call ptr @data(ptr %args, i64 0)
  %x_at = getelementptr %Job, ptr %job, i32 0, i32 7
  store ptr %x, ptr %x_at
  %y = call ptr @data(ptr %results, i64 0)
  %y_at = getelementptr %Job, ptr %job, i32 0, i32 8
  store ptr %y, ptr %y_at
  %rows_at = getelementptr %Job, ptr %job, i32 0, i32 9
  store i64 %rows, ptr %rows_at
  %width_at = getelementptr %Job, ptr %job, i32 0, i32 10
  store i64 %width, ptr %width_at
  %chunks_at = getelementptr %Job, ptr %job, i32 0, i32 12
  store i64 %chunks, ptr %chunks_at
  %length_at = getelementptr %Job, ptr %job, i32 0, i32 13
  store i64 %list_length, ptr %length_at
  %frame_at = getelementptr %Job, ptr %job, i32 0, i32 14
  store ptr %frame, ptr %frame_at
  br label %part

part:
  %p = phi i64 [0, %0], [%p_next, %part_go]
  %more_parts = icmp ult i64 %p, %parts
  br i1 %more_parts, label %part_go, label %ask

part_go:
  %p_next = add i64 %p, 1
  %weights = call ptr @data(ptr %args, i64 %p_next)
  %weights_at = getelementptr %Job, ptr %job, i32 0, i32 11, i64 %p
  store ptr %weights, ptr %weights_at
  br label %part

ask:
  %schedule_args = alloca %Schedule
  store %Schedule { i64 40, ptr null, ptr null, ptr @help, ptr null }, ptr %schedule_args
  %schedule_context_at = getelementptr %Schedule, ptr %schedule_args, i32 0, i32 2
  store ptr %context, ptr %schedule_context_at
  %argument_at = getelementptr %Schedule, ptr %schedule_args, i32 0, i32 4
  store ptr %job, ptr %argument_at
  %several = icmp ugt i64 %here, 1
  %any = load atomic i64, ptr @looking monotonic, align 8
  %somebody = icmp ne i64 %any, 0
  %lay = and i1 %several, %somebody
  br i1 %lay, label %lay_down, label %helpers

lay_down:
  %forgotten = atomicrmw xchg ptr @next_job, ptr %job acq_rel
  %was_one = icmp ne ptr %forgotten, null
  br i1 %was_one, label %for_the_other, label %laid_down

for_the_other:
  call void @leave(ptr %forgotten)
  br label %laid_down

laid_down:
  br label %helpers

helpers:
  %asked = phi i64 [1, %ask], [2, %laid_down], [%asked_next, %helped]
  %enough = icmp uge i64 %asked, %here
  br i1 %enough, label %begin, label %helper

helper:
  %comes = call i1 @succeeds(ptr %frame, i32 11, ptr %schedule_args)
  br i1 %comes, label %helped, label %alone

alone:
  call void @leave(ptr %job)
  br label %helped

helped:
  %asked_next = add i64 %asked, 1
  br label %helpers

begin:
  call void @run(ptr %job)
  br label %wait

wait:
  %done = load atomic i64, ptr %done_at acquire, align 8
  %all = icmp eq i64 %done, %blocks
  br i1 %all, label %over, label %yield

yield:
  %ignored = call i32 @sched_yield()
  br label %wait

over:
  call void @leave(ptr %job)
  ret void
}

declare i64 @llvm.umax.i64(i64, i64)
declare i64 @llvm.umin.i64(i64, i64)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
