package sts

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/aws/aws-sdk-go-v2/aws/arn"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/imdsgate/imdsgate/cache"
)

// Bounds in bytes of what a pod and an Event are shown: STS's own text can be kilobytes of encoded authorization message.
const (
	maxText = 512
	maxHint = 400
)

// failure is an error with a text fit to be shown; its cause stays reachable for errors.Is and errors.As.
type failure struct {
	text string
	err  error
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error { return f.err }

// asIssueError returns err as Issue promises it.
func asIssueError(err error) *cache.IssueError {
	if issueErr, ok := errors.AsType[*cache.IssueError](err); ok {
		return issueErr
	}
	return &cache.IssueError{Err: &failure{text: oneLine(err.Error(), maxText), err: err}}
}

// failure tells what an error of the SDK means. The token must not appear in it, whatever the server answers.
func (s *STS) failure(op string, key cache.Key, err error, token string) *cache.IssueError {
	text := op
	if key.RoleARN != "" {
		text += " " + oneLine(key.RoleARN, maxText/2)
	}
	api, ok := errors.AsType[smithy.APIError](err)
	if !ok || status(err) == 0 || !fromSTS(api) {
		return &cache.IssueError{Err: &failure{text: oneLine(text+": "+noAnswer(err), maxText), err: err}}
	}
	message, _, _ := strings.Cut(api.ErrorMessage(), "Encoded authorization failure message")
	if token != "" {
		message = strings.ReplaceAll(message, token, "[token]")
	}
	code := oneLine(api.ErrorCode(), 64)
	return &cache.IssueError{
		Code:   code,
		Denied: denied(code, message, status(err)),
		Hint:   oneLine(s.hint(op, key, code, message), maxHint),
		Err:    &failure{text: oneLine(text+": "+code+": "+message, maxText), err: err},
	}
}

// fromSTS tells an error that STS sent from one that the SDK made of something else, such as a proxy's page.
func fromSTS(api smithy.APIError) bool {
	return api.ErrorCode() != "" && api.ErrorCode() != "UnknownError"
}

// status of the answer; 0: there was none.
func status(err error) int {
	if res, ok := errors.AsType[*smithyhttp.ResponseError](err); ok && res.Response != nil {
		return res.HTTPStatusCode()
	}
	return 0
}

// noAnswer describes a call that STS did not answer, without the SDK's wrapping.
func noAnswer(err error) string {
	switch codeLabel(err) {
	case codeTimeout:
		return "STS did not answer in time"
	case codeUnreachable:
		if u, ok := errors.AsType[*url.Error](err); ok {
			return fmt.Sprintf("STS cannot be reached at %s: %v", u.URL, u.Err)
		}
		return "STS cannot be reached: " + err.Error()
	}
	if n := status(err); n != 0 {
		return fmt.Sprintf("something that is not STS answered %d", n)
	}
	return err.Error()
}

// codeLabel is the value of the metric's label.
func codeLabel(err error) string {
	if err == nil {
		return codeOK
	}
	if api, ok := errors.AsType[smithy.APIError](err); ok && status(err) != 0 {
		if knownCode(api.ErrorCode()) {
			return api.ErrorCode()
		}
		return codeOther
	}
	if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() || errors.Is(err, context.DeadlineExceeded) {
		return codeTimeout
	}
	if _, ok := errors.AsType[*smithyhttp.RequestSendError](err); ok && !errors.Is(err, context.Canceled) {
		return codeUnreachable
	}
	return codeOther
}

// denied tells a refusal that stands until somebody changes a policy or an annotation from one that may pass.
func denied(code, message string, status int) bool {
	switch {
	case status >= 500, status == 429, status == 408, ownCredentialsRefused(code):
		return false
	case strings.Contains(code, "Throttl"), code == "RequestLimitExceeded", code == "TooManyRequestsException", code == "SlowDown",
		code == "ServiceUnavailable", code == "InternalFailure", code == "InternalError",
		code == "IDPCommunicationError", code == "RequestExpired", code == "RequestTimeout":
		return false
	case code == "InvalidIdentityToken" && strings.Contains(message, "verification key"):
		return false // STS could not fetch the cluster's keys: its half of IDPCommunicationError
	}
	return true
}

// ownCredentialsRefused: what signed the request is not accepted, or the web identity token ran out on its way. Neither is
// the pod's doing, and other credentials or another token will be used next time.
func ownCredentialsRefused(code string) bool {
	switch code {
	case "ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException", "InvalidAccessKeyId",
		"SignatureDoesNotMatch", "IncompleteSignature", "MissingAuthenticationToken", "InvalidToken":
		return true
	}
	return false
}

// hint says what to change.
func (s *STS) hint(op string, key cache.Key, code, message string) string {
	switch code {
	case "AccessDenied":
		if op == opWebIdentity {
			return fmt.Sprintf("the role's trust policy must allow sts:AssumeRoleWithWebIdentity to the cluster's OIDC provider for "+
				"sub %q and aud %q", subject(key), key.Audience)
		}
		if op == opAssumeRole {
			return s.assumeRoleHint(key, message)
		}
	case "InvalidIdentityToken":
		switch {
		case strings.Contains(message, "OpenIDConnect provider"), strings.Contains(message, "issuer"):
			return "create an IAM OIDC provider for the cluster's issuer in the role's account"
		case strings.Contains(message, "verification key"):
			return "STS must be able to fetch the keys of the cluster's issuer"
		case strings.Contains(message, "audience"):
			return fmt.Sprintf("the cluster's IAM OIDC provider must have the client ID %q", key.Audience)
		}
	case "IDPCommunicationError":
		return "STS must be able to fetch the keys of the cluster's issuer"
	case "ValidationError":
		switch {
		case strings.Contains(message, "role chaining"):
			return "shorten the session duration to 1h"
		case strings.Contains(message, "MaxSessionDuration"):
			return "shorten the session duration, or raise the role's MaxSessionDuration"
		case strings.Contains(message, "roleArn"), strings.Contains(message, "ARN"):
			return "correct the role's ARN"
		}
	case "RegionDisabledException":
		return "activate this region's STS endpoint in the role's account"
	case "PackedPolicyTooLarge":
		return "the session tags are too long: turn -session-tags off"
	case "RequestExpired", "SignatureDoesNotMatch":
		return "check the node's clock and credentials"
	case "ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId":
		if op != opWebIdentity {
			return "the node's own credentials are not accepted"
		}
	}
	return ""
}

func (s *STS) assumeRoleHint(key cache.Key, message string) string {
	actions := "sts:AssumeRole"
	if key.Tags != (cache.Tags{}) {
		actions = "sts:AssumeRole and sts:TagSession"
	}
	who := principal(message)
	if who == "" {
		who = "the node's role"
		if s.intermediate != nil {
			who = "the intermediate role"
		}
	}
	externalID := "without an external ID"
	if key.ExternalID != "" {
		externalID = "with the external ID of the annotation"
	}
	return fmt.Sprintf("the role's trust policy must allow %s to %s, %s; the caller's own policy must allow it too if the role is in "+
		"another account or trusts all of its own", actions, who, externalID)
}

// principal finds who was refused in STS's text, "User: arn:aws:sts::123456789012:assumed-role/node/i-0 is not authorized …".
func principal(message string) string {
	_, rest, found := strings.Cut(message, "User: ")
	who, _, _ := strings.Cut(rest, " ")
	a, err := arn.Parse(who)
	if !found || err != nil {
		return ""
	}
	if session, ok := strings.CutPrefix(a.Resource, "assumed-role/"); ok {
		role, _, _ := strings.Cut(session, "/")
		return fmt.Sprintf("the role %s of account %s", role, a.AccountID)
	}
	return who
}

func subject(key cache.Key) string {
	return "system:serviceaccount:" + key.Namespace + ":" + key.ServiceAccount
}

// oneLine cuts s to limit bytes of printable text.
func oneLine(s string, limit int) string {
	s = strings.TrimSpace(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s[:min(len(s), 4*limit)]))
	if len(s) <= limit {
		return s
	}
	const more = "…"
	cut := limit - len(more)
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + more
}
