// Package aws stands in for AWS where the real one cannot be had: STS, and as much of S3 and IAM as tells whose credentials
// a client holds (ListBuckets, ListGroups). It is strict: what real AWS refuses it refuses, with the same code, status and,
// where software reads it, text. Unmodified SDKs and CLIs talk to it.
//
//   - Every signature is computed again with the SDK's own signer over the headers that the client signed, and compared;
//     scope, clock and session token are checked (TestSignature).
//   - Credentials are only those that this server issued, until they expire (TestSessionExpires).
//   - AssumeRole needs a trust policy that names the caller, and the caller's own policy where IAM would look at it; external
//     ID, session tags, duration limits and role chaining's 1 h count (TestAssumeRole).
//   - AssumeRoleWithWebIdentity verifies the token against the issuer's keys, and audience and subject against provider and
//     trust policy (TestWebIdentity).
//   - A parameter that is not understood is refused, never ignored (TestUnknownParameters).
//   - Every call is logged, refused ones included (TestCalls), and every access key's owner is known (TestOwner).
//
// The rules are written from AWS's documentation; where that is silent about the order of checks, authorization comes before
// what the role's own settings would tell.
package aws
