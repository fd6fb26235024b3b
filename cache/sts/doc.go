// Package sts issues role sessions for package cache: by AssumeRole with the node's credentials, or by
// AssumeRoleWithWebIdentity with a token of the pod's service account, which needs no credentials at all.
//
// Rules, each with its test:
//   - Everything that a key holds goes into the request, nothing else does (TestRequestForm).
//   - The web identity token is asked for anew for every issue; it and the issued secrets reach no log line and no error
//     (TestWebIdentity, TestNoSecretInLogsOrErrors).
//   - A refusal is final only when somebody must change a policy or an annotation; everything else may be tried again, and
//     that is the caller's to do. The only retries here are the SDK's: two attempts of at most 4 s, so that a call ends
//     within the 10 s that the cache allows (TestClassification, TestAttempts, TestTimeout).
//   - A refusal names the likely fix in one line (TestHints).
//   - A duration that STS caps is asked for again as 1 h, once, and said once per role (TestDurationFallback).
//   - The intermediate role is assumed ahead of its expiry, once for all callers, and a failed refresh never discards a
//     session that is still valid (TestIntermediate and the tests beside it).
//   - An answer without complete credentials, or of another session than was asked for, is an error, not credentials
//     (TestIncompleteAnswer, TestAnswerOfAnotherSession). No more than 64 KiB of an answer are read (TestEndlessAnswer).
package sts
