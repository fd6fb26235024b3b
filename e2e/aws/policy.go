package aws

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws/arn"
)

// Actions of policies that this server looks at.
const (
	ActionAssumeRole  = "sts:AssumeRole"
	ActionTagSession  = "sts:TagSession"
	ActionWebIdentity = "sts:AssumeRoleWithWebIdentity"
	ActionListBuckets = "s3:ListAllMyBuckets"
	ActionListGroups  = "iam:ListGroups"
)

// Role is an IAM role.
type Role struct {
	ARN   string
	Trust []Trust
	// Allow is what its sessions may do: an action, or an action, a space and a resource; * stands for anything in both.
	// Policies cannot deny here.
	Allow              []string
	MaxSessionDuration time.Duration // 0: 1 h; 1 h to 12 h
}

// Trust is one statement of a trust policy, with one principal. All its conditions must hold; an empty one is none.
type Trust struct {
	AWS       string   // principal: ARN of a role, user or role session, or arn:aws:iam::<account>:root
	Federated string   // principal: ARN of an OIDC provider
	Actions   []string // empty: sts:AssumeRole with AWS, sts:AssumeRoleWithWebIdentity with Federated

	ExternalID  string            // StringEquals sts:ExternalId
	RequestTags map[string]string // StringLike aws:RequestTag/<key>: these tags are required
	TagKeys     []string          // ForAllValues:StringEquals aws:TagKeys: only these tags are allowed
	Subject     string            // StringLike <issuer>:sub
	Audience    string            // StringEquals <issuer>:aud
}

func parseARN(s string) (arn.ARN, error) { return arn.Parse(s) }

func (r Role) check() error {
	a, err := parseARN(r.ARN)
	if err != nil || a.Service != "iam" || len(a.AccountID) != 12 || !strings.HasPrefix(a.Resource, "role/") || r.name() == "" {
		return fmt.Errorf("%q is not the ARN of a role", r.ARN)
	}
	if d := r.MaxSessionDuration; d != 0 && (d < time.Hour || d > 12*time.Hour) {
		return fmt.Errorf("role %s: MaxSessionDuration must be between 1h and 12h", r.ARN)
	}
	for _, t := range r.Trust {
		if (t.AWS == "") == (t.Federated == "") {
			return fmt.Errorf("role %s: a trust statement needs one principal", r.ARN)
		}
		if t.Federated == "" && t.Subject+t.Audience != "" || t.Federated != "" && t.ExternalID != "" {
			return fmt.Errorf("role %s: a condition does not fit the principal %s%s", r.ARN, t.AWS, t.Federated)
		}
	}
	return nil
}

// name is the last segment of the ARN.
func (r Role) name() string { return r.ARN[strings.LastIndexByte(r.ARN, '/')+1:] }

func (r Role) account() string {
	a, _ := parseARN(r.ARN) // checked when it was set
	return a.AccountID
}

func (r Role) maxDuration() time.Duration {
	if r.MaxSessionDuration == 0 {
		return time.Hour
	}
	return r.MaxSessionDuration
}

// sessionARN is how a session of the role is called. The role's path is not in it.
func (r Role) sessionARN(name string) string {
	a, _ := parseARN(r.ARN) // checked when it was set
	return fmt.Sprintf("arn:%s:sts::%s:assumed-role/%s/%s", a.Partition, a.AccountID, r.name(), name)
}

func (t Trust) actions() []string {
	switch {
	case len(t.Actions) != 0:
		return t.Actions
	case t.Federated != "":
		return []string{ActionWebIdentity}
	}
	return []string{ActionAssumeRole}
}

// trusts tells whether the statement lets the caller do the action, and whether it names the caller itself rather than its
// account: then, in one account, IAM does not ask the caller's own policy.
func (t Trust) trusts(c *session, action, externalID string, tags map[string]string) (ok, byName bool) {
	if t.AWS == "" || !matchAny(t.actions(), action) {
		return false, false
	}
	a, err := parseARN(t.AWS)
	switch {
	case err != nil:
		return false, false
	case t.AWS == c.arn, c.role != "" && t.AWS == c.role:
		byName = true
	case a.Resource == "root" && a.AccountID == c.account:
	default:
		return false, false
	}
	if t.ExternalID != "" && t.ExternalID != externalID {
		return false, false
	}
	for k, pattern := range t.RequestTags {
		if v, ok := tags[k]; !ok || !match(pattern, v) {
			return false, false
		}
	}
	for k := range tags {
		if t.TagKeys != nil && !slices.Contains(t.TagKeys, k) {
			return false, false
		}
	}
	return true, byName
}

// mayAssume is IAM's decision on AssumeRole or TagSession.
func (s *Server) mayAssume(c *session, role Role, action, externalID string, tags map[string]string) bool {
	for _, t := range role.Trust {
		ok, byName := t.trusts(c, action, externalID, tags)
		if ok && (byName && c.account == role.account() || s.allowed(c, action, role.ARN)) {
			return true
		}
	}
	return false
}

// allowed tells whether the caller's own policy permits an action. The caller holds s.mu.
func (s *Server) allowed(c *session, action, resource string) bool {
	allow := c.allow
	if c.role != "" {
		allow = s.roles[c.role].Allow
	}
	for _, a := range allow {
		permitted, on, found := strings.Cut(a, " ")
		if !found {
			on = "*"
		}
		if match(permitted, action) && match(on, resource) {
			return true
		}
	}
	return false
}

func matchAny(patterns []string, s string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return match(p, s) })
}

// match is StringLike without its question mark: * stands for any characters.
func match(pattern, s string) bool {
	first, rest, wild := strings.Cut(pattern, "*")
	if !wild {
		return pattern == s
	}
	s, ok := strings.CutPrefix(s, first)
	if !ok {
		return false
	}
	for i := 0; i <= len(s); i++ {
		if match(rest, s[i:]) {
			return true
		}
	}
	return false
}
