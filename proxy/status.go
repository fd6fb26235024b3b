package proxy

import (
	"errors"
	"net/http"
	"strings"
	"unicode"

	"github.com/imdsgate/imdsgate/cache"
)

// Why a request was not served: the value of the reason labels, and of result in the log.
const (
	reasonHost        = "host"
	reasonMethod      = "method"
	reasonPath        = "path"
	reasonForwarded   = "forwarded"
	reasonTTL         = "token_ttl"
	reasonToken       = "token"
	reasonFlood       = "token_flood"
	reasonConnections = "connections"
	reasonOtherRole   = "other_role"
	reasonNoRole      = "no_role"
	reasonDenied      = "role_denied"
	reasonInvalid     = "role_invalid"
	reasonCredentials = "credentials_failed"

	reasonNotSynced  = "not_synced"
	reasonUnknownIP  = "unknown_ip"
	reasonAmbiguous  = "ambiguous_ip"
	reasonIncomplete = "incomplete"
	reasonIdentify   = "other"

	reasonUnavailable = "unavailable" // neither denied nor unidentified
	reasonAbsent      = "absent"      // the same
)

// fault is an answer that needs no more than itself to be explained.
type fault struct {
	code         int
	reason, text string
}

func (f *fault) Error() string { return f.text }

// Every text holds a space: old CRTs take the body of a failed role list for a role name, unless it cannot be in a path.
var (
	errHost      = &fault{http.StatusForbidden, reasonHost, "Host must be 169.254.169.254 or [fd00:ec2::254]"}
	errMethod    = &fault{http.StatusMethodNotAllowed, reasonMethod, "method not allowed"}
	errPath      = &fault{http.StatusNotFound, reasonPath, "no such path"}
	errForwarded = &fault{http.StatusForbidden, reasonForwarded, "forwarded requests are refused: remove X-Forwarded-For"}
	errTTL       = &fault{http.StatusBadRequest, reasonTTL, "X-Aws-Ec2-Metadata-Token-Ttl-Seconds must be given once, 1 to 21600"}
	errToken     = &fault{http.StatusUnauthorized, reasonToken, "session token not valid: PUT /latest/api/token for a new one"}
	errNoToken   = &fault{http.StatusUnauthorized, reasonToken, "session token required: PUT /latest/api/token"}
	errFlood     = &fault{http.StatusServiceUnavailable, reasonFlood, "too many requests without a valid session token"}
	errOtherRole = &fault{http.StatusNotFound, reasonOtherRole, "not the role of this pod"}
	errUndecided = &fault{http.StatusServiceUnavailable, reasonIncomplete, "the role of this pod is not decided yet, ask again"}
	errAbsent    = &fault{http.StatusNotFound, reasonAbsent, "this instance has no such metadata"}
	errUpstream  = &fault{http.StatusServiceUnavailable, reasonUnavailable, "the instance's metadata endpoint does not answer, ask again"}
)

// status turns an error into what the pod is told and why: the one place that does. Texts say what to do and never hold
// what another pod may not know, so the text of a CallerFinder's error, which may name other pods, is not used.
func status(err error) (code int, reason, text string) {
	if f, ok := errors.AsType[*fault](err); ok {
		return f.code, f.reason, f.text
	}
	if r, ok := errors.AsType[*Refusal](err); ok {
		switch r.Kind {
		case NoRole:
			return http.StatusNotFound, reasonNoRole, publicText(r.Error())
		case Denied:
			return http.StatusForbidden, reasonDenied, publicText(r.Error())
		default:
			return http.StatusForbidden, reasonInvalid, publicText(r.Error())
		}
	}
	if i, ok := errors.AsType[*cache.IssueError](err); ok {
		if i.Denied {
			return http.StatusForbidden, reasonCredentials, publicText(i.Error())
		}
		// What failed on the way to STS is the operator's to know, addresses and all; STS's own code and what to do are no secret.
		text := "no credentials available yet, ask again; the log of this node's imdsgate says why"
		if i.Code != "" {
			text = "no credentials available yet, STS answered " + i.Code + ", ask again"
		}
		return http.StatusServiceUnavailable, reasonUnavailable, publicText(withFix(text, i.Hint))
	}
	code = http.StatusServiceUnavailable
	switch {
	case errors.Is(err, ErrNotSynced):
		return code, reasonNotSynced, "imdsgate is starting and does not know the pods of this node yet, ask again"
	case errors.Is(err, ErrUnknownIP):
		return code, reasonUnknownIP, "no pod of this node is known to have this IP yet, ask again"
	case errors.Is(err, ErrAmbiguousIP):
		return code, reasonAmbiguous, withFix("more than one running pod has this IP", FixAmbiguousIP)
	case errors.Is(err, ErrIncomplete):
		return code, reasonIncomplete, "the pod's service account or namespace is not known yet, ask again"
	case errors.Is(err, cache.ErrUnavailable):
		return code, reasonUnavailable, "no credentials available yet, ask again"
	}
	return code, reasonIdentify, "the request cannot be answered now, ask again"
}

// publicText is at most 1 KiB of one line that nobody can take for a role name or for JSON.
func publicText(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
	if s = strings.TrimSpace(s); len(s) > 1<<10 {
		s = strings.ToValidUTF8(s[:1<<10], "")
	}
	if !strings.Contains(s, " ") || strings.ContainsAny(s[:1], "{[\"") {
		s = "refused: " + s
	}
	return s
}
