package aws

import (
	"context"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Versions of the query protocol, and the namespaces of its answers.
const (
	stsVersion = "2011-06-15"
	iamVersion = "2010-05-08"
)

const chainedLimit = time.Hour // of sessions of roles assumed with a role's session

// operation is one operation of one service.
type operation struct {
	anonymous bool     // carries no signature
	fields    []string // that it understands; "Tags.member." is a prefix
	do        func(context.Context, *request) (any, *refusal)
}

func (s *Server) operation(service, name string) (operation, bool) {
	switch service + ":" + name {
	case "sts:AssumeRole":
		return operation{do: s.assumeRole, fields: []string{"RoleArn", "RoleSessionName", "DurationSeconds", "ExternalId", "Tags.member."}}, true
	case "sts:AssumeRoleWithWebIdentity":
		return operation{
			do: s.assumeRoleWithWebIdentity, fields: []string{"RoleArn", "RoleSessionName", "DurationSeconds", "WebIdentityToken"}, anonymous: true,
		}, true
	case "sts:GetCallerIdentity":
		return operation{do: s.getCallerIdentity}, true
	case "iam:ListGroups":
		return operation{do: s.listGroups}, true
	case "s3:ListBuckets":
		return operation{do: s.listBuckets}, true
	}
	return operation{}, false
}

func validationError(format string, args ...any) *refusal {
	return &refusal{400, "ValidationError", fmt.Sprintf(format, args...)}
}

// checkForm refuses parameters that would otherwise be silently ignored.
func (o operation) checkForm(form url.Values) *refusal {
	for name, values := range form {
		known := name == "Action" || name == "Version" || slices.ContainsFunc(o.fields, func(f string) bool {
			return name == f || strings.HasSuffix(f, ".") && strings.HasPrefix(name, f)
		})
		if !known || len(values) != 1 {
			return validationError("parameter %s is not understood here, or is given twice", name)
		}
	}
	return nil
}

// sessionRequest is what the two ways to assume a role have in common.
type sessionRequest struct {
	roleARN, name string
	duration      time.Duration
	externalID    string
	tags          map[string]string
}

var (
	sessionNamePattern = regexp.MustCompile(`^[\w+=,.@-]*$`)
	externalIDPattern  = regexp.MustCompile(`^[\w+=,.@:/-]*$`)
	tagPattern         = regexp.MustCompile(`^[\p{L}\p{Z}\p{N}_.:/=+\-@]*$`)
)

// constraint is AWS's text for a parameter that breaks the service's model.
func constraint(value, name, rule string) *refusal {
	return validationError("1 validation error detected: Value '%s' at '%s' failed to satisfy constraint: Member must %s", value, name, rule)
}

func length(value, name string, least, most int) *refusal {
	switch {
	case len(value) < least:
		return constraint(value, name, fmt.Sprintf("have length greater than or equal to %d", least))
	case len(value) > most:
		return constraint(value, name, fmt.Sprintf("have length less than or equal to %d", most))
	}
	return nil
}

func (r *request) session() (q sessionRequest, refused *refusal) {
	q.roleARN, q.name, q.externalID = r.form.Get("RoleArn"), r.form.Get("RoleSessionName"), r.form.Get("ExternalId")
	for _, check := range []func() *refusal{
		func() *refusal { return length(q.roleARN, "roleArn", 20, 2048) },
		func() *refusal { return length(q.name, "roleSessionName", 2, 64) },
		func() *refusal {
			if !sessionNamePattern.MatchString(q.name) {
				return constraint(q.name, "roleSessionName", `satisfy regular expression pattern: [\w+=,.@-]*`)
			}
			return nil
		},
		func() *refusal {
			if !r.form.Has("ExternalId") {
				return nil
			}
			if !externalIDPattern.MatchString(q.externalID) {
				return constraint(q.externalID, "externalId", `satisfy regular expression pattern: [\w+=,.@:\/-]*`)
			}
			return length(q.externalID, "externalId", 2, 1224)
		},
		func() (refused *refusal) { q.duration, refused = duration(r.form); return refused },
		func() (refused *refusal) { q.tags, refused = tags(r.form); return refused },
	} {
		if refused := check(); refused != nil {
			return q, refused
		}
	}
	if a, err := parseARN(q.roleARN); err != nil || a.Service != "iam" || a.Region != "" || len(a.AccountID) != 12 ||
		!strings.HasPrefix(a.Resource, "role/") || strings.ContainsAny(a.Resource, "*? ") {
		return q, validationError("%s is invalid", q.roleARN)
	}
	r.call.ExternalID, r.call.Duration, r.call.Tags = q.externalID, q.duration, q.tags
	return q, nil
}

func duration(form url.Values) (time.Duration, *refusal) {
	text := form.Get("DurationSeconds")
	if !form.Has("DurationSeconds") {
		return time.Hour, nil
	}
	n, err := strconv.Atoi(text)
	switch {
	case err != nil:
		return 0, &refusal{400, "MalformedInput", "DurationSeconds is not a number"}
	case n < 900:
		return 0, constraint(text, "durationSeconds", "have value greater than or equal to 900")
	case n > 43200:
		return 0, constraint(text, "durationSeconds", "have value less than or equal to 43200")
	}
	return time.Duration(n) * time.Second, nil
}

// tags reads Tags.member.1.Key, Tags.member.1.Value, … without gaps.
func tags(form url.Values) (map[string]string, *refusal) {
	tags := make(map[string]string)
	read := 0
	for i := 1; ; i++ {
		prefix := fmt.Sprintf("Tags.member.%d.", i)
		if !form.Has(prefix + "Key") {
			break
		}
		k, v := form.Get(prefix+"Key"), form.Get(prefix+"Value")
		name := fmt.Sprintf("tags.%d.member", i)
		if refused := length(k, name+".key", 1, 128); refused != nil {
			return nil, refused
		}
		if refused := length(v, name+".value", 0, 256); refused != nil {
			return nil, refused
		}
		if !tagPattern.MatchString(k) || !tagPattern.MatchString(v) {
			return nil, constraint(k+"="+v, name, `satisfy regular expression pattern: [\p{L}\p{Z}\p{N}_.:/=+\-@]+`)
		}
		for other := range tags {
			if strings.EqualFold(other, k) {
				return nil, &refusal{400, "InvalidParameterValue", "Duplicate tag keys found. Please note that Tag keys are case insensitive."}
			}
		}
		tags[k] = v
		read++
		if form.Has(prefix + "Value") {
			read++
		}
	}
	for name := range form {
		if strings.HasPrefix(name, "Tags.member.") {
			read--
		}
	}
	switch {
	case read != 0:
		return nil, validationError("Tags are malformed")
	case len(tags) > 50:
		return nil, validationError("1 validation error detected: Value at 'tags' failed to satisfy constraint: Member must have length less than or equal to 50")
	case len(tags) == 0:
		return nil, nil
	}
	return tags, nil
}

func (s *Server) assumeRole(_ context.Context, r *request) (any, *refusal) {
	q, refused := r.session()
	if refused != nil {
		return nil, refused
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	denied := func(action string) *refusal {
		return &refusal{403, "AccessDenied", fmt.Sprintf("User: %s is not authorized to perform: %s on resource: %s", r.caller.arn, action, q.roleARN)}
	}
	role, ok := s.roles[q.roleARN] // AWS does not tell an unknown role from a forbidden one
	if !ok || !s.mayAssume(r.caller, role, ActionAssumeRole, q.externalID, q.tags) {
		return nil, denied(ActionAssumeRole)
	}
	if len(q.tags) != 0 && !s.mayAssume(r.caller, role, ActionTagSession, q.externalID, q.tags) {
		return nil, denied(ActionTagSession)
	}
	if !r.caller.user && q.duration > chainedLimit {
		return nil, validationError("The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining")
	}
	answer, refused := s.newSession(r, role, q)
	if refused != nil {
		return nil, refused
	}
	return assumeRoleResponse{
		Result: assumeRoleResult{Credentials: answer.credentials, User: answer.user, PackedPolicySize: packedSize(q.tags)},
		Meta:   r.meta(),
	}, nil
}

type issued struct {
	credentials credentialsXML
	user        assumedRoleUserXML
}

// newSession issues what the trust policy granted. The caller holds s.mu.
func (s *Server) newSession(r *request, role Role, q sessionRequest) (issued, *refusal) {
	if q.duration > role.maxDuration() {
		return issued{}, validationError("The requested DurationSeconds exceeds the MaxSessionDuration set for this role.")
	}
	c := s.issue(&session{
		role: role.ARN, name: q.name, arn: role.sessionARN(q.name), account: role.account(), tags: q.tags, expires: s.now().Add(q.duration),
	})
	r.call.Issued = c.AccessKeyID
	return issued{
		credentials: credentialsXML{c.AccessKeyID, c.SecretAccessKey, c.SessionToken, c.Expires.UTC().Format(time.RFC3339)},
		user:        assumedRoleUserXML{roleID(role.ARN) + ":" + q.name, role.sessionARN(q.name)},
	}, nil
}

// packedSize is made up: AWS counts tags towards a limit in percent.
func packedSize(tags map[string]string) int {
	n := 0
	for k, v := range tags {
		n += len(k) + len(v)
	}
	return n * 100 / 4096
}

func (s *Server) getCallerIdentity(_ context.Context, r *request) (any, *refusal) {
	id := "AIDA" + strings.TrimPrefix(roleID(r.caller.arn), "AROA")
	if r.caller.role != "" {
		id = roleID(r.caller.role) + ":" + r.caller.name
	}
	return callerIdentityResponse{Result: callerIdentityResult{r.caller.arn, id, r.caller.account}, Meta: r.meta()}, nil
}
