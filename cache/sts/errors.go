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

	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/imdsgate/imdsgate/cache"
)

// Bounds in bytes of what a pod and an Event are shown: STS's own text can be kilobytes of encoded authorization message.
const (
	maxText  = 512
	maxHint  = 720 // a statement of a trust policy; a longer one is told in words
	maxShown = 1000
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
		return &cache.IssueError{Err: &failure{text: oneLine(text+": "+noAnswer(err), maxText), err: err}, Hint: unansweredHint(err)}
	}
	message, _, _ := strings.Cut(api.ErrorMessage(), "Encoded authorization failure message")
	if token != "" {
		message = strings.ReplaceAll(message, token, "[token]")
	}
	code := oneLine(api.ErrorCode(), 64)
	hint := oneLine(s.hint(op, key, refusal{code, message, token}), maxHint)
	return &cache.IssueError{
		Code:   code,
		Denied: denied(code, message, status(err)), Throttled: throttled(code, status(err)),
		Hint: hint,
		Err:  &failure{text: oneLine(text+": "+code+": "+message, min(maxText, maxShown-len(hint))), err: err},
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

// throttled tells that STS gets more requests than it answers.
func throttled(code string, status int) bool {
	return status == 429 || strings.Contains(code, "Throttl") ||
		code == "RequestLimitExceeded" || code == "TooManyRequestsException" || code == "SlowDown"
}

// denied tells a refusal that stands until somebody changes a policy or an annotation from one that may pass.
func denied(code, message string, status int) bool {
	switch {
	case status >= 500, status == 408, ownCredentialsRefused(code), throttled(code, status):
		return false
	case code == "ServiceUnavailable", code == "InternalFailure", code == "InternalError",
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
